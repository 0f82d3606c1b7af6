"""Trial: weights in 8 bits. int8 against fp8 (e4m3), groups of 32 to a whole row, and least-squares scales.

    python benchmarks/trial_weights.py --out trial.json
    python benchmarks/trial_weights.py --out trial.json --data FOLDER [--model FILE.gguf] [--windows 64]

Errors are shares of the weights' power: of random weights, and with `--data` of SmolLM2-135M-Instruct's head and
decoder. Then also the KL divergence of the model on WikiText-2 test (windows of 2048) with the head's or the decoder's
weights rounded, everything else in bf16. The embedding, which shares the head's weight, stays as it is.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import common
import torch
from torch import Tensor, nn

from wush_compile import formats
from wush_compile.evaluation.language import compare

GROUPS = (32, 64, 128, 0)  # 0: a whole row
CLIPS = (1, 0.99, 0.98, 0.96, 0.94, 0.92, 0.9)  # shares of the maximum that a least-squares scale is chosen from


def by_group(round_group: Callable[[Tensor], Tensor], group: int) -> Callable[[Tensor], Tensor]:
    return lambda w: round_group(w.float().unflatten(-1, (-1, group or w.shape[-1]))).flatten(-2)


def int8(w: Tensor) -> Tensor:
    scale = (w.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    return (w / scale).nan_to_num().round().clamp(-127, 127) * scale


def e4m3(w: Tensor) -> Tensor:
    scale = (w.abs().amax(-1, keepdim=True) / 448).bfloat16().float()
    return (w / scale).nan_to_num().clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def least_squares(w: Tensor) -> Tensor:
    """int8 with the best of several scales."""
    largest = w.abs().amax(-1, keepdim=True)
    tried = torch.stack([int8(w.clamp(-share * largest, share * largest)) for share in CLIPS])
    best = (tried - w).square().sum(-1, keepdim=True).argmin(0, keepdim=True)
    return tried.gather(0, best.expand(1, *w.shape))[0]


def product(w: Tensor) -> Tensor:
    """The library's own format."""
    return formats.dequantize(*formats.quantize(w, "int8", "absmax"), "int8")


CANDIDATES = {
    "int8 32": product,
    **{f"int8 {g or 'row'}": by_group(int8, g) for g in GROUPS[1:]},
    "int8 32 least squares": by_group(least_squares, 32),
    **{f"e4m3 {g or 'row'}": by_group(e4m3, g) for g in GROUPS},
}


def fits(candidate: str, width: int) -> bool:
    """Whether the group of a candidate divides the width."""
    group = candidate.split()[1]
    return group == "row" or width % int(group) == 0


def errors_of(w: Tensor) -> dict[str, float]:
    return {name: error(w, rounded) for name, rounded in CANDIDATES.items() if fits(name, w.shape[-1])}


def error(w: Tensor, rounded: Callable[[Tensor], Tensor]) -> float:
    """The rounding error's share of the power of w [N, K], some rows at a time."""
    lost = sum((rounded(rows) - rows.float()).square().sum().double() for rows in w.split(4096))
    return float(f"{(lost / w.float().square().sum().double()).item():.3e}")


def random_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = (1024, 4096)
    return {
        "normal": torch.randn(shape),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "Student t, 4 degrees of freedom": torch.distributions.StudentT(4.0).sample(shape),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 raw as valid.txt and test.txt; left out: random weights alone"
    )
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file; fetched when left out")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--kl", nargs="+", default=["int8 32", "e4m3 32", "e4m3 row"], choices=list(CANDIDATES))
    parser.add_argument("--out", type=Path, default=Path("trial_weights.json"))
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and args.data else "cpu")
    errors = {what: errors_of(w) for what, w in random_weights().items()}
    result = {**common.environment(device), "errors": errors}
    common.write_json(args.out, result)
    if args.data:
        model, tokenizer = common.load_smollm2(args.model, device)
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        parts = {"SmolLM2's head": ["lm_head"], "SmolLM2's decoder": [name for name in linears if name != "lm_head"]}
        text = common.wikitext(args.data, "test")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: args.windows * 2048]
        result["windows"], result["kl"] = args.windows, {}
        for what, names in parts.items():
            last = linears[names[-1]].weight.detach()
            errors[what if len(names) == 1 else names[-1]] = errors_of(last)
            for candidate in args.kl:
                rounded = copy.deepcopy(model)
                for name in names:
                    module = rounded.get_submodule(name)
                    value = CANDIDATES[candidate](module.weight.detach()).to(module.weight.dtype)
                    module.weight = nn.Parameter(value, requires_grad=False)  # not the embedding's, which it shared
                measured = compare(model, rounded, ids, 2048, progress=False)
                result["kl"].setdefault(what, {})[candidate] = float(f"{measured.kl:.3e}")
                print(what, candidate, result["kl"][what][candidate], flush=True)
                common.write_json(args.out, result)
    for what, found in errors.items():
        print(what, found)


if __name__ == "__main__":
    main()
