"""The trial of `trial_recommend.py` at a size for a CPU: SmolLM2-135M-Instruct in fp32, WikiText-2, MXFP4.

    python benchmarks/trial_recommend_cpu.py --data FOLDER --out trial_recommend_cpu.json

The survey solves every group at every rung on 8 windows of 512 tokens of valid, and predicts on 4 others. The
assignments are those of `trial_recommend.py`, time on an RTX 5090 by its rates at 4096 rows is the cost, and their KL
is measured on windows of 512 tokens of test. Nothing is quantized again for an assignment: its model is put together
from the survey's solutions, all of which were made on the inputs of the unquantized model.

The random assignments are the same in every trial. So the predictions are also compared with the KLs that a GPU
measured for them, quantized as `wc.quantize` does (`rank_correlation_measured`).
"""

import json
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from trial_recommend import NAMES, assignments, linears, recommended, verdict

import wush_compile as wc
from wush_compile.calibration import recommend as recommending
from wush_compile.calibration import survey as surveys
from wush_compile.calibration.costs import KEPT, Cost, machine
from wush_compile.data import windows
from wush_compile.solver.loss import decoded, operands

SOLVED, HELD, WINDOW = 8, 4, 512
MEASURED = Path(__file__).parent / "results" / "trial_recommend_h200.json"


def surveyed(model: nn.Module, solve: Tensor, held: Tensor) -> tuple[list, dict]:
    """(what `recommend` predicts of each group, group number -> its solutions) for windows [n, T]."""
    kept = {}

    class Trial(surveys.Survey):
        def _hold_out(self):
            self.windows, aside = self.windows[: len(solve)], self.windows[len(solve) :]
            return aside

        def _predicted(self, solved, windows):
            kept.update(solved)
            return super()._predicted(solved, windows)

    recommending.Survey = Trial
    return recommending.survey(model, [*solve.split(1), *held.split(1)], wc.WushConfig()), kept


class Assembled:
    """A model whose linears take the rungs of an assignment, by the arithmetic of their solutions."""

    def __init__(self, model: nn.Module, groups: list, solved: dict):
        self.model, self.solved, self.rungs = model, solved, [KEPT] * len(groups)
        self.weights: dict[tuple[int, str], Tensor] = {}
        for i, group in enumerate(groups):
            start = 0
            for name in group.members:
                linear = model.get_submodule(name)
                self._replace(linear, i, slice(start, start + linear.out_features))
                start += linear.out_features

    def _replace(self, linear: nn.Linear, i: int, rows: slice) -> None:
        plain = linear.forward

        def forward(x: Tensor) -> Tensor:
            rung = self.rungs[i]
            if rung == KEPT:
                return plain(x)
            solution, recipe = self.solved[i][NAMES.index(rung)]
            if (i, rung) not in self.weights:
                weight = decoded(solution, recipe, slice(None))
                self.weights[i, rung] = weight.bfloat16() if rung.startswith("W4") else weight  # exact
            _, quantized = operands(x.reshape(-1, x.shape[-1]), linear.weight, solution, recipe)
            return (quantized @ self.weights[i, rung][rows].float().T).view(*x.shape[:-1], -1)

        linear.forward = forward

    @torch.no_grad()
    def __call__(self, ids: Tensor, rungs: list[str]) -> Tensor:
        """log-probabilities [T - 1, V] of ids [1, T]."""
        self.rungs = rungs
        return self.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)


def with_measured(rows: dict[str, dict]) -> float:
    """The rank correlation of the predictions for random assignments with the KLs of the kept run on a GPU."""
    measured = json.loads(MEASURED.read_text())["rows"]
    both = {name: {**row, "kl": measured[name]["kl"]} for name, row in rows.items() if name.startswith("random")}
    return verdict(both)["rank_correlation"]


def main() -> None:
    parser = common.trial_parser(__doc__, __file__, needs_data=True)
    parser.add_argument("--windows", type=int, default=4, help="of test")
    args = parser.parse_args()
    model, tokenizer = common.load_smollm2(args.model, torch.device("cpu"))
    model = model.float()
    valid = torch.cat(windows(common.wikitext(args.data, "valid"), tokenizer, WINDOW, 24))
    test = torch.cat(windows(common.wikitext(args.data, "test"), tokenizer, WINDOW, 64))[7::16][: args.windows]
    groups, solved = surveyed(model, valid[:SOLVED], valid[SOLVED:][:: 16 // HELD])
    cost = Cost("mxfp4", machine("rtx5090"), 4096)
    todo = recommended(groups, cost) | assignments(linears(model), cost)
    todo |= {f"uniform {rung}": [rung] * len(groups) for rung in NAMES if rung != KEPT}
    run, rows = Assembled(model, groups, solved), {}
    for ids in test.split(1):
        reference = run(ids, [KEPT] * len(groups))
        for name, rungs in todo.items():
            row = rows.setdefault(name, {"kl": [], "rungs": rungs})
            row["predicted"] = sum(g.kl.get(rung, 0.0) for g, rung in zip(groups, rungs, strict=True))
            row["share"] = sum(map(cost, groups, rungs)) / sum(cost(g, KEPT) for g in groups)
            p = run(ids, rungs)
            row["kl"].append(float((reference.exp() * (reference - p)).sum(-1).double().mean()))
            print(name, row["predicted"], row["kl"], flush=True)
        means = {name: {**row, "kl": sum(row["kl"]) / len(row["kl"])} for name, row in rows.items()}
        result = {**common.environment(torch.device("cpu")), "rows": means, **verdict(means)}
        result["rank_correlation_measured"] = with_measured(means)
        common.write_json(args.out, result)
    print(json.dumps({key: result[key] for key in ("rank_correlation", "rank_correlation_measured", "less_kl")}))


if __name__ == "__main__":
    main()
