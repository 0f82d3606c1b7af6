"""One transform for all experts of a layer or one an expert, and how far to shrink an expert's moment: layer losses.

    python benchmarks/trial_experts.py --data FOLDER --out trial_experts.json

FOLDER holds valid.txt and test.txt of WikiText-2 raw. Layers of SmolLM2-135M-Instruct become 8 experts of 192 channels,
and a random router sends a token of the layer's own input to 2 of them, to some experts more than to others. Each row
is the loss of the layer on tokens of test, relative to the output's energy, over all experts together, in percent: with
one transform of all experts (`shared`) or one an expert (`own`), for GPTQ with (Σ_e xxᵀ + τ H̄) / (n_e + τ), H̄ the mean
moment of all rows. τ = inf is H̄ for every expert.
"""

import argparse
import itertools
from pathlib import Path

import common
import torch
from torch import Tensor

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.recipe import Recipe
from wush_compile.solver import experts as solver
from wush_compile.solver.loss import loss_sums
from wush_compile.solver.solve import solve

EXPERTS, EACH = 8, 2
SHRINKAGE = (0.0, 32.0, 128.0, 512.0, 2048.0, float("inf"))


def inputs_of(model: torch.nn.Module, layers: list[int], batches: list[Tensor]) -> dict[int, Tensor]:
    """The inputs of the MLPs of some layers, [T, H] each."""
    seen: dict[int, list[Tensor]] = {i: [] for i in layers}
    handles = [
        model.model.layers[i].mlp.register_forward_pre_hook(lambda _, args, i=i: seen[i].append(args[0].flatten(0, 1)))
        for i in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model.model(batch.to(model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return {i: torch.cat(parts) for i, parts in seen.items()}


def routed(x: Tensor, seed: int) -> list[Tensor]:
    """The numbers of the rows that go to each expert."""
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(EXPERTS, x.shape[1], generator=generator).to(x.device)
    skew = torch.linspace(1.0, -1.0, EXPERTS, device=x.device)  # some experts see many tokens, some few
    logits = x.float() @ router.T
    chosen = (logits / logits.std() + skew).topk(EACH).indices  # [T, 2]
    return [(chosen == e).any(-1).nonzero()[:, 0] for e in range(EXPERTS)]


def products(mlp: torch.nn.Module, x: Tensor, rows: list[Tensor]) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Product -> (weights [E, N, K], the rows of each expert [n_e, K])."""
    gate, up = (w.weight.detach().unflatten(0, (EXPERTS, -1)) for w in (mlp.gate_proj, mlp.up_proj))
    down = mlp.down_proj.weight.detach().unflatten(1, (EXPERTS, -1)).transpose(0, 1)
    first = [x[r] for r in rows]
    second = [torch.nn.functional.silu(own @ g.T) * (own @ u.T) for own, g, u in zip(first, gate, up, strict=True)]
    return {"gate_up": (torch.cat((gate, up), 1), first), "down": (down.contiguous(), second)}


def loss(weights: Tensor, seen: list[Tensor], held: list[Tensor], recipe: Recipe, tau: float, own: bool) -> float:
    """The relative loss on the held-out rows, over all experts together."""
    moment = torch.stack([x.float().T @ x.float() for x in seen])
    count = torch.tensor([len(x) for x in seen])
    pooled = moment.sum(0, dtype=torch.float64) / int(count.sum())
    sample = torch.cat(seen)[:: max(1, int(count.sum()) // 2048)][:2048]
    t, _, g, _ = solver.solve_shared(weights, recipe, pooled=pooled, sample=sample, name="trial")
    shared = t, torch.linalg.inv_ex(t.to(torch.float64)).inverse
    error = power = 0.0
    for e, rows in enumerate(held):
        mixed = pooled if tau == float("inf") else moment[e] + tau * pooled
        n = 1 if tau == float("inf") else len(seen[e]) + tau
        if n == 0 or not len(rows):
            continue
        given = {"moment": mixed, "count": n, "name": "trial"}
        if own:
            solution = solve(weights[e], recipe, sample=seen[e] if len(seen[e]) else sample, **given)
        else:
            solution = solve(weights[e], recipe, sample=None, shared=shared, **given)
            solution.input_global_scale = g
        own_error, own_power = loss_sums(rows, weights[e], solution, recipe)
        error, power = error + own_error, power + own_power
    return float(error / power)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 14, 27])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 8192, 65536], help="calibration tokens")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    where = common.device(args.device)
    model, tokenizer = common.load_smollm2(args.model, where)
    seen, held = (
        inputs_of(model, args.layers, windows(common.wikitext(args.data, split), tokenizer, 512, count))
        for split, count in (("valid", -(-max(args.tokens) // 512)), ("test", 8))
    )
    result = {**common.environment(where), "rows": []}
    print(f"{result['device']}; experts' rows of the fewest and the most tokens, then relative loss in %")
    print(f"| | | rows | {' | '.join(f'τ = {tau:g}' for tau in SHRINKAGE)} |\n|---|---|---|" + "---|" * len(SHRINKAGE))
    for format, tokens, kind in itertools.product(args.formats, args.tokens, ("gate_up", "down")):
        recipe = wc.WushConfig(format=format, activation_rounding="nearest").recipe
        for own in (False, True):
            losses = []
            for tau in SHRINKAGE:
                of_layers = []
                for i in args.layers:
                    mlp = model.model.layers[i].mlp
                    calibration, test = seen[i][:tokens], held[i]
                    weights, rows = products(mlp, calibration, routed(calibration, i))[kind]
                    _, others = products(mlp, test, routed(test, i))[kind]
                    of_layers.append(loss(weights, rows, others, recipe, tau, own))
                losses.append(sum(of_layers) / len(of_layers))
            counts = sorted(map(len, rows))
            row = {"format": format, "tokens": tokens, "product": kind, "transform": "own" if own else "shared"}
            result["rows"].append(row | {"rows": counts, "loss": dict(zip(map(str, SHRINKAGE), losses, strict=True))})
            common.write_json(args.out, result)
            print(
                f"| {format}, {tokens} tokens, {kind} | {row['transform']} | {counts[0]} to {counts[-1]} | "
                + " | ".join(f"{100 * value:.3f}" for value in losses)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
