"""Trial: what a few massive tokens do to a layer's moment, by the rule that weighs its tokens (docs/spec.md §3).

    python benchmarks/trial_massive_tokens.py --out trial.json        # about a minute on two CPU cores

A synthetic layer, 512 × 512 with 8192 calibration tokens and as many others to measure. One token in 500 has two
channels at ± a multiple of the usual magnitude. The layer's output goes through an RMS norm, as it does in a decoder:
a gradient of a token's output is therefore inversely proportional to the output's norm. Each rule weighs token t by

    uniform     1
    gradient    s_t, the gradient's norm; mean 1, at most 20
    power       s_t^1.5, mean 1, at most 20
    squared     s_t², mean 1, at most 20
    clipped     min(1, 4 · median ‖x‖² / ‖x‖²), whatever the gradient
    both        gradient times clipped

The result is the loss of eq. 1 relative to the output's energy, in percent: on ordinary tokens, and on massive ones.
"""

import argparse
from pathlib import Path

import common
import torch
from torch import Tensor

import wush_compile as wc
from wush_compile.calibration.token_weights import LARGEST_WEIGHT
from wush_compile.solver.loss import layer_loss
from wush_compile.solver.solution import moment_shape
from wush_compile.solver.solve import solve
from wush_compile.solver.transforms import diagonal_blocks

WIDTH, TOKENS, EVERY = 512, 8192, 500
CASES = (1, 30, 1000, 10000)


def inputs(mix: Tensor, multiple: float, generator: torch.Generator) -> Tensor:
    """[TOKENS, WIDTH] in bf16; every 500th token is massive."""
    x = torch.randn(TOKENS, WIDTH, generator=generator) @ mix.T
    if multiple > 1:
        x[::EVERY, 5] += multiple * x.std()
        x[::EVERY, 300] -= multiple * x.std()
    return x.bfloat16()


def weights(rule: str, x: Tensor, w: Tensor) -> Tensor | None:
    """The weight of each token [TOKENS]."""
    x = x.float()
    power, gradient = x.square().sum(1), 1 / (x @ w.float().T).norm(dim=1)
    clipped = (4 * power.median() / power).clamp(max=1)
    s = {"gradient": gradient, "both": gradient, "power": gradient**1.5, "squared": gradient**2}.get(rule)
    if s is not None:
        s = (s / s.mean()).clamp(max=LARGEST_WEIGHT)
    return {"uniform": None, "clipped": clipped, "both": None if s is None else s * clipped}.get(rule, s)


def losses(rule: str, format: str, transform: str, activations: str | None, multiple: float) -> dict[str, float]:
    """Relative losses, in percent, of one rule on the synthetic layer."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(WIDTH, generator=generator)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 * torch.logspace(-1, 0.5, WIDTH)[order]
    w = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5).bfloat16()
    x, fresh = (inputs(mix, multiple, generator) for _ in range(2))
    config = wc.WushConfig(format=format, transform=transform, activation_format=activations)
    own = weights(rule, x, w)
    rows = x.float() if own is None else x.float() * own.sqrt()[:, None]
    moment = rows.T @ rows
    if len(moment_shape(config, WIDTH)) == 3:
        moment = diagonal_blocks(moment, config.group_size).contiguous()
    sample = torch.cat([x[1:1025], x[x.float().norm(dim=1).topk(64).indices]])
    solution = solve(w, config.recipe, moment=moment, count=TOKENS, sample=sample, name="layer")
    massive = torch.zeros(TOKENS, dtype=torch.bool)
    massive[::EVERY] = multiple > 1
    parts = {"ordinary": fresh[~massive], **({"massive": fresh[massive]} if multiple > 1 else {})}
    return {name: round(100 * layer_loss(part, w, solution, config.recipe)[1], 3) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("trial_massive_tokens.json"))
    parser.add_argument("--cases", type=float, nargs="+", default=CASES, help="multiples; 1 has no massive tokens")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    args = parser.parse_args()
    result = {**common.environment(torch.device("cpu")), "rows": []}
    settings = [
        ("hadamard", "uniform"),
        *(("wush", r) for r in ("uniform", "gradient", "power", "squared", "clipped", "both")),
    ]
    for format in args.formats:
        for multiple in args.cases:
            for transform, rule in settings:
                found = losses(rule, format, transform, "same", multiple)
                row = {"format": format, "multiple": multiple, "transform": transform, "weights": rule, **found}
                result["rows"].append(row)
                print(row, flush=True)
                common.write_json(args.out, result)


if __name__ == "__main__":
    main()
