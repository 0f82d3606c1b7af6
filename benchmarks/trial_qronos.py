"""Trial: weights that make up for the layers in front of them (GPTAQ, Qronos): the library's `correction` is group-.25.

    python benchmarks/trial_qronos.py --formats mxfp4 --out trial.json        the text of `make demo`, on a CPU
    python benchmarks/trial_qronos.py --data FOLDER --out trial.json          the full protocol, on a GPU
    python benchmarks/trial_qronos.py --data FOLDER --encoder DIRECTORY       the encoder of `trial_encoder.py`

X are a group's inputs in the unquantized model, X̂ those in the model whose groups in front are quantized, D the
weights of the tokens. The loss of all tokens, weighted, ‖X Wᵀ − X̂ Ŵᵀ‖², has the moment H = X̂ᵀ D X̂ and the target
W' = W + W (X − X̂)ᵀ D X̂ (H + λ)⁻¹. A row is named

    library      `wush_compile.quantize` without a correction
    layer-a      X̂ of groups whose layers in front are quantized, the weights W + a (W' − W)
    group-a      X̂ of groups whose groups in front are quantized, in their own layer too
    noise-a      as group-a, and X̂ are rounded as the group will round them
    iv-a         as group-a, by A = (XᵀDX + λ)⁻¹ XᵀD(X − X̂), which noise in X̂ does not shrink
    ..-a-d       with λ = d of the mean of H's diagonal, in place of .01
    cv-a         as group-a, and a times the share for which W', of one half of the sequences, errs least on the other
                 half; λ is the one of `LAMBDAS` that errs least
    rows-a       as cv-a, with a share of each row of W
"""

import contextlib
import copy
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import common
import torch
import trial_encoder
from torch import Tensor, nn

import wush_compile as wc
from wush_compile.calibration import loop
from wush_compile.calibration.solve_group import solve_group
from wush_compile.calibration.token_weights import token_weights
from wush_compile.evaluation.language import compare
from wush_compile.formats import dequantize
from wush_compile.modules import WushGroup, feedback_arguments
from wush_compile.passes.calibration.observe import GROUP_SAMPLE_ROWS, Observation

ROWS = (
    "library",
    "layer-0",
    "layer-.5",
    "layer-1",
    "group-0",
    "group-.5",
    "group-.75",
    "group-1",
    "noise-.5",
    "noise-1",
)
DAMPING = 0.01
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Stop(Exception):
    """Ends a run at the place of interest."""


def weighed(model: nn.Module, data: list[Tensor], **settings) -> tuple[list, list[Tensor], dict]:
    """(the library's groups, the weight of each token [rows] in each, its sensitivities by number)."""
    found = []

    def keep(variants, groups, windows, batch_size, run):
        found.append((groups, token_weights(variants, groups, windows, batch_size, run)))
        raise Stop

    loop.token_weights = keep
    try:
        with contextlib.suppress(Stop):
            wc.quantize(model, data, progress=False, **settings)
    finally:
        loop.token_weights = token_weights
    [(groups, weights)] = found
    device = next(model.parameters()).device
    of_tokens = [torch.cat(weights.of_group[i]).to(device) if i in weights else None for i in range(len(groups))]
    return groups, of_tokens, weights.sensitivity


def first_inputs(model: nn.Module, layer: nn.Module, data: list[Tensor]) -> list[tuple]:
    """(arguments, keywords) of the first layer, of each batch."""
    found = []

    def keep(_, args, kwargs):
        found.append((args, kwargs))
        raise Stop

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    for batch in data:
        with contextlib.suppress(Stop):
            model(batch)
    handle.remove()
    return found


def run(layer: nn.Module, inputs: list[tuple], names: tuple[str, ...] = ()) -> tuple[list[tuple], dict[str, Tensor]]:
    """(the inputs of the next layer, the rows [T, K] that each of these linears of the layer has read)."""
    seen = {name: [] for name in names}
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(lambda _, a, n=name: seen[n].append(a[0].flatten(0, -2)))
        for name in names
    ]
    outputs = []
    for args, kwargs in inputs:
        y = layer(*args, **kwargs)
        outputs.append(((y[0] if isinstance(y, tuple) else y, *args[1:]), kwargs))
    for handle in handles:
        handle.remove()
    return outputs, {name: torch.cat(rows) for name, rows in seen.items()}


def rounded(x: Tensor, group: WushGroup) -> Tensor:
    """Rows [T, K] as the group rounds them, in the basis of the model, float32."""
    parts = []
    for rows in x.split(8192):
        codes, scales = torch.ops.wush.transform_quantize(
            rows,
            group.input_transform,
            group.input_global_scale,
            group.operand,
            group.scale_rule,
            *feedback_arguments(group.input_feedback),
        )
        values = dequantize(codes, scales, group.format, group.input_global_scale)
        t = group.input_transform.double()  # [K/B or 1, B, B]
        blocks = values.double().unflatten(-1, (-1, t.shape[-1])).transpose(0, 1)  # [K/B, n, B]
        parts.append(torch.linalg.solve(t, blocks.mT).mT.transpose(0, 1).flatten(1).float())
    return torch.cat(parts)


def observation(rows: Tensor, weight: Tensor | None, group, sensitivity) -> Observation:
    """What the library's observer sees of rows [T, K]."""
    k = group.width
    moment = torch.zeros(k, k, device=rows.device)
    count = torch.zeros((), dtype=torch.int64, device=rows.device)
    sample = torch.zeros(GROUP_SAMPLE_ROWS, k, dtype=rows.dtype, device=rows.device)
    for start in range(0, len(rows), 4096):
        part, w = (None if t is None else t[start : start + 4096] for t in (rows, weight))
        torch.ops.wush.observe(part, None, moment, count, sample, group.recipe.seed, w)
    return Observation(moment, count, sample, sensitivity=sensitivity)


class Moments(NamedTuple):
    """H = R̂ᵀ D R̂ and C = R̂ᵀ D (X − X̂), float64 [K, K], where R̂ is X̂ or, for `iv`, X."""

    h: Tensor
    c: Tensor

    @classmethod
    def of(cls, rows: Tensor, x: Tensor, weight: Tensor | None, by: Tensor | None = None) -> "Moments":
        ours, theirs = rows.double(), x.double()
        by = ours if by is None else by.double()
        scaled = by if weight is None else by * weight.double()[:, None]
        return cls(scaled.T @ by, scaled.T @ (theirs - ours))

    def change(self, damping: float) -> Tensor:
        """A [K, K]: W' − W = W Aᵀ."""
        h = self.h.clone()
        h.diagonal().add_(damping * h.diagonal().mean())
        return torch.linalg.solve(h, self.c)


def shares(w: Tensor, halves: list[Moments], damping: float, each: bool) -> tuple[Tensor, float]:
    """(the share [] or [N, 1] of W' − W that errs least on the half that did not make it, the loss that it saves)."""
    up = down = 0
    for one, other in (halves, halves[::-1]):
        change = w @ one.change(damping).T  # [N, K]
        up = up + (change * (w @ other.c.T)).sum(-1, keepdim=True)
        down = down + ((change @ other.h) * change).sum(-1, keepdim=True)
    if not each:
        up, down = up.sum(), down.sum()
    share = (up / down.clamp(min=1e-300)).clamp(0, 1)
    return share, float((2 * share * up - share.square() * down).sum())


def corrected(weights: dict, group, x: Tensor, rows: Tensor, weight: Tensor | None, row: str, length: int) -> dict:
    """The weights of a group's linears by name, W + share · (W' − W). length: tokens of a sequence."""
    mode, *numbers = row.split("-")
    share, damping = [*map(float, numbers), DAMPING][:2]
    w = {one.weight: weights[one.weight].double() for one in group.linears}
    if mode in ("cv", "rows"):
        half = torch.arange(len(rows), device=rows.device) // length % 2 == 0
        halves = [Moments.of(rows[own], x[own], None if weight is None else weight[own]) for own in (half, ~half)]
        stacked = torch.cat(list(w.values()))
        found = [(*shares(stacked, halves, damping, mode == "rows"), damping) for damping in LAMBDAS]
        best, _, damping = max(found, key=lambda one: one[1])
        print(group.name, "lambda", damping, "share", [round(float(f[0].mean()), 3) for f in found], file=sys.stderr)
        moments, share = Moments(*(sum(both) for both in zip(*halves, strict=True))), share * best
    elif mode == "iv":
        moments = Moments.of(rows, x, weight, by=x)
    else:
        moments = Moments.of(rows, x, weight)
    a = share * moments.change(damping)
    change = torch.cat(list(w.values())) @ a.T
    parts = change.split([len(v) for v in w.values()])
    return weights | {name: (v + c).to(weights[name].dtype) for (name, v), c in zip(w.items(), parts, strict=True)}


def quantize(model: nn.Module, data: list[Tensor], row: str, known: tuple) -> nn.Module:
    """A quantized copy."""
    mode = row.split("-")[0]
    groups, token_weight, sensitivity = known
    quantized, weights = copy.deepcopy(model), dict(model.named_parameters())
    layers: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        if layer := re.match(r".*?\.\d+(?=\.)", group.name):
            layers.setdefault(layer[0], []).append(i)
    theirs = first_inputs(model, model.get_submodule(next(iter(layers))), data)
    ours = [(args, dict(kwargs)) for args, kwargs in theirs]
    for path, own in layers.items():
        names = {i: groups[i].name.removeprefix(f"{path}.") for i in own}
        before, after = model.get_submodule(path), quantized.get_submodule(path)
        theirs, x = run(before, theirs, tuple(names.values()))
        seen = run(after, ours, tuple(names.values()))[1] if mode == "layer" else {}
        for i in own:
            group, of_tokens = groups[i], token_weight[i]
            rows = seen[names[i]] if seen else run(after, ours, (names[i],))[1][names[i]]

            def solved(rows: Tensor, i=i, group=group, of_tokens=of_tokens, x=x, names=names) -> WushGroup:
                w = weights
                if not row.endswith("-0"):
                    w = corrected(weights, group, x[names[i]], rows, of_tokens, row, data[0].shape[1])
                return solve_group(group, w, observation(rows, of_tokens, group, sensitivity.get(i))).group

            found = solved(rows)
            if mode == "noise":
                found = solved(rounded(rows, found))
            found.install(quantized)
        ours, _ = run(after, ours)
    return quantized


@torch.no_grad()
def main() -> None:
    parser = common.trial_parser(__doc__, __file__)
    parser.add_argument("--encoder", type=Path, help="the directory of an encoder, in place of SmolLM2")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of the language model, with --data")
    parser.add_argument("--windows", type=int, default=256, help="windows of 128 tokens of the encoder")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names as above")
    args = parser.parse_args()
    device = common.device("auto")
    if args.encoder is None:
        model, tokenizer = common.load_smollm2(args.model, device)
        data, ids, window = common.smollm2_texts(args.data, tokenizer, device, args.calibration_windows)
        model.config.use_cache = False
    else:
        model, data, ids = trial_encoder.load(args.encoder, args.data, args.windows, device)
    result = {**common.environment(device), "rows": []}
    for format in args.formats:
        known = weighed(model, data, format=format)
        for row in args.rows:
            start = time.perf_counter()
            if row == "library":
                quantized = wc.quantize(copy.deepcopy(model), data, format=format, correction=0.0, progress=False)
            else:
                quantized = quantize(model, data, row, known)
            found = {"format": format, "row": row, "quantize_seconds": round(time.perf_counter() - start, 1)}
            if args.encoder is None:
                measured = compare(model, quantized, ids, window, progress=False)
                found |= {"kl": round(measured.kl, 4), "perplexity": round(measured.perplexity, 3)}
            else:
                found |= trial_encoder.errors(trial_encoder.outputs(model, ids), trial_encoder.outputs(quantized, ids))
            result["rows"].append(found)
            print(found, flush=True)
            common.write_json(args.out, result)


if __name__ == "__main__":
    main()
