"""Trial: errors of a weight's rows that make up for each other (YAQA, arXiv 2505.22988), beside those of its channels.

    python benchmarks/trial_row_feedback.py --formats mxfp4 --out trial.json      the text of `make demo`, on a CPU
    python benchmarks/trial_row_feedback.py --data FOLDER --out trial.json        the full protocol, on a GPU
    python benchmarks/trial_row_feedback.py --data FOLDER --encoder DIRECTORY     the encoder of `trial_encoder.py`

For small errors D [N, K] of weights the KL is half the mean of (gᵀ D x)², about tr(Dᵀ G D H) / 2: H is the moment of
inputs that the library uses, G [N, N] that of the gradients by the outputs. Its rows are rounded in R parts. With the
errors of the parts before, a part has the target W_p - G_pp⁻¹ G_p< D_<, where G_pp is that of all rows from p on. Each
part is rounded as the library rounds all rows. A row is named

    library         `wush_compile.quantize`
    spread-R        part p are the rows p, p + R, p + 2R ..
    sorted-R        the parts are in the order of falling diagonals of G
    ..-R-d          with d of the mean of G's diagonal added to it, in place of .01
    ..x-R           a token's g gᵀ counts ‖x‖²
"""

import argparse
import copy
import time
from pathlib import Path

import common
import torch
import trial_encoder
from torch import Tensor, nn

import wush_compile as wc
from wush_compile.calibration import solve_group
from wush_compile.calibration.likelihood import sampled_gradient
from wush_compile.evaluation.language import compare
from wush_compile.solver import solve as library

ROWS = ("library", "spread-8", "sorted-8", "spread-32", "sorted-32", "spreadx-8", "spread-8-.1")
DAMPING = 0.01


class Gradients:
    """G of each group of linears, by the group's name: float64 [N, N]; `weighed` with ‖x‖²."""

    def __init__(self, model: nn.Module, members: dict[str, list[str]], data: list[Tensor], weighed: bool):
        self.of: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}

        def hook(name: str):
            def forward(_, args, output):
                inputs[name] = args[0].detach().flatten(0, -2)
                output.register_hook(lambda g: found.__setitem__(name, g.flatten(0, -2)))
                return output

            return forward

        handles = [model.get_submodule(n).register_forward_hook(hook(n)) for own in members.values() for n in own]
        start = 0
        for batch in data:
            with torch.enable_grad():
                embeds = model.get_input_embeddings()(batch).detach().requires_grad_()
                out = model(inputs_embeds=embeds)
                result, kind = (out.logits, "categorical") if "logits" in out else (out.last_hidden_state, "normal")
                result.backward(sampled_gradient(result.detach(), kind, None, start, 0))
            start += len(batch)
            for group, names in members.items():
                if names[0] not in found:  # no gradient, as in the pooler of an encoder
                    continue
                rows = torch.cat([found[n] for n in names], -1).float()
                if weighed:
                    rows = rows * torch.linalg.vector_norm(inputs[names[0]].float(), dim=-1, keepdim=True)
                gram = (rows.T @ rows).double()
                self.of[group] = self.of[group] + gram if group in self.of else gram
        for handle in handles:
            handle.remove()


def members_of(model: nn.Module, data: list[Tensor], format: str) -> dict[str, list[str]]:
    """The names of the linears of each group."""
    found: dict[str, list[str]] = {}

    class Stop(Exception):
        pass

    from wush_compile.calibration import loop

    def keep(variants, groups, *_):
        found.update({g.name: [linear.name for linear in g.linears] for g in groups})
        raise Stop

    kept, loop.token_weights = loop.token_weights, keep
    try:
        wc.quantize(copy.deepcopy(model), data[:1], format=format, progress=False)
    except Stop:
        pass
    finally:
        loop.token_weights = kept
    return found


def parts_of(kind: str, count: int, g: Tensor) -> list[Tensor]:
    """The rows of each part, in the order of rounding."""
    rows = torch.arange(len(g), device=g.device)
    if kind.startswith("spread"):
        return [rows[p::count] for p in range(count)]
    return list(g.diagonal().argsort(descending=True).tensor_split(count))


class Feedback:
    """Puts rows' feedback in place of the library's GPTQ."""

    def __init__(self, gradients: dict[str, Tensor], row: str, sweeps: int):
        kind, *numbers = row.split("-")
        self.gradients, self.kind, self.count, self.sweeps = gradients, kind, int(numbers[0]), sweeps
        self.damping = float(numbers[1]) if len(numbers) > 1 else DAMPING
        self.name, self.factors, self.gains = "", None, []
        self.kept = solve_group.solve, library.gptq, library.sweep_, library.row_factors

    def __enter__(self) -> "Feedback":
        solve, gptq, sweep_, row_factors = self.kept

        def named(*args, name, **kwargs):
            self.name, self.factors = name, None
            return solve(*args, name=name, **kwargs)

        def factors(*args):
            self.factors = row_factors(*args)
            return self.factors

        def in_parts(w, unit, diagonal, format, rule, g):
            if self.name not in self.gradients:
                found = gptq(w, unit, diagonal, format, rule, g)
                sweep_(w, unit, diagonal, format, rule, g, *found, self.sweeps)
                return found
            moment = self.gradients[self.name].to(w.device)
            moment = moment + self.damping * moment.diagonal().mean() * torch.eye(len(moment), device=w.device)
            f = (
                torch.ones(w.shape[1], device=w.device, dtype=w.dtype)
                if self.factors is None
                else self.factors.double()
            )
            parts = parts_of(self.kind, self.count, moment)
            order = torch.cat(parts[::-1])
            lower = torch.linalg.cholesky(moment[order][:, order])  # parts are rounded from the last to the first
            codes = scales = None
            error = torch.zeros_like(w)  # W̃ᵀ f - Q(W̃ f)ᵀ
            stop = len(order)
            for rows in parts:
                first = stop - len(rows)
                target = w[:, rows]
                if stop < len(order):
                    behind = (error / f)[:, order[stop:]] @ lower[stop:, first:stop]  # [K, n]
                    own = lower[first:stop, first:stop]
                    shift = torch.linalg.solve_triangular(own, behind, upper=False, left=False)
                    target = target + shift * f[rows]
                target = target.contiguous()
                found = gptq(target, unit, diagonal, format, rule, g)
                if self.sweeps:
                    sweep_(target, unit.clone(), diagonal, format, rule, g, *found, self.sweeps)
                if codes is None:
                    codes = found[0].new_empty(w.shape[1], found[0].shape[1])
                    scales = found[1].new_empty(w.shape[1], found[1].shape[1])
                codes[rows] = found[0]
                scales.view(torch.uint8)[rows] = found[1].view(torch.uint8)
                error[:, rows] = w[:, rows] - target + found[2]
                stop = first
            return codes, scales, error

        solve_group.solve, library.gptq, library.row_factors = named, in_parts, factors
        library.sweep_ = lambda *_: None
        return self

    def __exit__(self, *_) -> None:
        solve_group.solve, library.gptq, library.sweep_, library.row_factors = self.kept


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt; the text of `make demo` without")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--encoder", type=Path, help="the directory of an encoder, in place of SmolLM2")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of the language model, with --data")
    parser.add_argument("--windows", type=int, default=256, help="windows of 128 tokens of the encoder")
    parser.add_argument("--activations", default="same", help="activation_format: same, fp8, or 16 for none")
    parser.add_argument("--out", type=Path, default=Path("trial_row_feedback.json"))
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
    settings = {"activation_format": None if args.activations == "16" else args.activations}
    result = {**common.environment(device), "rows": []}
    for format in args.formats:
        members, gradients = members_of(model, data, format), {}
        for row in args.rows:
            start = time.perf_counter()
            quantized, options = copy.deepcopy(model), {"format": format, "progress": False, **settings}
            if row == "library":
                wc.quantize(quantized, data, **options)
            else:
                weighed = row.split("-")[0].endswith("x")
                if weighed not in gradients:
                    gradients[weighed] = Gradients(model, members, data, weighed).of
                start = time.perf_counter()
                with Feedback(gradients[weighed], row, wc.WushConfig(format=format).sweeps):
                    wc.quantize(quantized, data, **options)
            found = {"format": format, "activations": args.activations, "row": row}
            found["quantize_seconds"] = round(time.perf_counter() - start, 1)
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
