"""Trial: weights that make up for the layers in front of them (GPTAQ, Qronos). The library solves all layers from the
unquantized model's activations.

    python benchmarks/trial_qronos.py --formats mxfp4 --out trial.json          the text of `make demo`, on a CPU

Layer by layer, group by group: X are a group's inputs in the unquantized model, X̂ those in the model whose groups in
front are quantized. The loss ‖X Wᵀ − X̂ Ŵᵀ‖² has the moment X̂ᵀX̂ and the target W' = W XᵀX̂ (X̂ᵀX̂ + λ)⁻¹. Token weights
are uniform in all rows:

    together     the moment XᵀX, the weights W: what the library does
    in-turn      the moment X̂ᵀX̂, the weights W
    corrected-a  the moment X̂ᵀX̂, the weights W + a (W' − W)
"""

import argparse
import contextlib
import copy
import itertools
import time
from pathlib import Path

import common
import torch
from torch import Tensor, nn

import wush_compile as wc
from wush_compile.evaluation.language import compare
from wush_compile.modules import Member, WushGroup
from wush_compile.solver.solve import solve

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
ROWS = {"together": (False, 0.0), "in-turn": (True, 0.0), "corrected-1/2": (True, 0.5), "corrected-1": (True, 1.0)}
DAMPING = 0.01
SAMPLE = 512


class Stop(Exception):
    """Ends a forward at the first layer."""


def first_inputs(model: nn.Module, data: list[Tensor]) -> list[tuple]:
    """(arguments, keywords) of the first decoder layer, of each batch."""
    found = []

    def keep(_, args, kwargs):
        found.append((args, kwargs))
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for batch in data:
        with contextlib.suppress(Stop):
            model(batch, use_cache=False)
    handle.remove()
    return found


def run(layer: nn.Module, inputs: list[tuple], name: str | None) -> tuple[list[Tensor], Tensor | None]:
    """(outputs of the layer, inputs of its linear `name` [T, K])."""
    seen, handle = [], None
    if name is not None:
        handle = layer.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0].flatten(0, -2)))
    outputs = [layer(*args, **kwargs) for args, kwargs in inputs]
    if handle is not None:
        handle.remove()
    outputs = [y[0] if isinstance(y, tuple) else y for y in outputs]
    return outputs, torch.cat(seen).float() if seen else None


def quantize(model: nn.Module, data: list[Tensor], format: str, row: str) -> nn.Module:
    """A quantized copy."""
    in_turn, share = ROWS[row]
    quantized, recipe = copy.deepcopy(model), wc.WushConfig(format=format, token_weights="uniform").recipe
    theirs = first_inputs(model, data)
    ours = [(args, dict(kwargs)) for args, kwargs in theirs]
    for layer, own in zip(model.model.layers, quantized.model.layers, strict=True):
        for part, names in GROUPS:
            linears = [layer.get_submodule(f"{part}.{name}") for name in names]
            _, x = run(layer, theirs, f"{part}.{names[0]}")
            w, rows = torch.cat([linear.weight for linear in linears]), x
            if in_turn:
                _, rows = run(own, ours, f"{part}.{names[0]}")
                moment, cross = (rows.T.double() @ t.double() for t in (rows, x))  # X̂ᵀX̂, X̂ᵀX
                moment.diagonal().add_(DAMPING * moment.diagonal().mean())
                change = torch.linalg.solve(moment, (cross - rows.T.double() @ rows.double()) @ w.double().T).T
                w = (w.double() + share * change).to(w.dtype)
            sample = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:SAMPLE]]
            found = solve(w, recipe, moment=rows.T @ rows, count=len(rows), sample=sample, name=names[0])
            starts = list(itertools.accumulate([linear.out_features for linear in linears], initial=0))
            members = [Member(f"{part}.{n}", a, b, False) for n, a, b in zip(names, starts, starts[1:])]
            buffers = {
                "weight_packed": found.weight_packed,
                "weight_scale": found.weight_scale,
                "weight_global_scale": found.weight_global_scale,
                "input_transform": found.transform,
                "input_global_scale": found.input_global_scale,
                "input_feedback": found.input_feedback,
                "bias": None,
            }
            WushGroup(members, recipe, found.transform_block_size, buffers).install(own)
        theirs = [((y, *a[1:]), k) for y, (a, k) in zip(run(layer, theirs, None)[0], theirs, strict=True)]
        if in_turn:
            ours = [((y, *a[1:]), k) for y, (a, k) in zip(run(own, ours, None)[0], ours, strict=True)]
    return quantized


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt; the text of `make demo` without")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, default=Path("trial_qronos.json"))
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    data, ids, window = common.smollm2_texts(args.data, tokenizer, device)
    result = {**common.environment(device), "rows": []}
    for format, row in itertools.product(args.formats, args.rows):
        start = time.perf_counter()
        quantized = quantize(model, data, format, row)
        seconds = round(time.perf_counter() - start, 1)
        measured = compare(model, quantized, ids, window, progress=False)
        found = {"format": format, "row": row, "kl": round(measured.kl, 4), "perplexity": round(measured.perplexity, 3)}
        result["rows"].append(found | {"quantize_seconds": seconds})
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
