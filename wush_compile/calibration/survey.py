"""Surveys a model for `recommend`: what each rung of precision costs each group, on the unquantized model.

The stages run as in calibration, but nothing is rewritten: each group is solved once for each rung. Then a pass with
gradients of the log-likelihood of tokens that the model itself predicts (`token_weights.py`) meets the errors of these
solutions. With g the gradient at a row of a group's output and e the row's error, the mean of (g · e)² / 2 is half the
curvature of the KL in the direction of the errors, as far as those of different rows do not add up (on SmolLM2 they
hardly do). Sequences that the solutions have not seen measure the errors.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..data import Batch
from ..errors import WushError
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation
from ..passes.calibration.taps import Tap
from ..recipe import Recipe
from ..solver.loss import decoded, operands
from ..solver.solution import GroupSolution
from ..solver.solve import solve
from .loop import Calibration
from .microbatch import regroup, sequences
from .token_weights import assigned, collected, measure, pass_size, wanted_groups

# One sequence of so many is set aside for the errors.
HELD = 8
# Tokens whose errors meet gradients: a part of those set aside, or all of them with several samples of predicted
# tokens, of which there are at most so many. Half of the variance of a prediction is that of the sample.
TOKENS, SAMPLES = 2**14, 8


@dataclass(frozen=True)
class Surveyed:
    """A group: its members' names, its sizes, and the predicted KL of each rung, in nats a token."""

    members: tuple[str, ...]
    rows: int
    width: int
    kl: dict[str, float]


class ErrorTap(Tap):
    """Sums gradient · error of each row over a group's members, for each of R solutions: [R, rows]."""

    def __init__(self, group: LinearGroup, solved: list[tuple[GroupSolution, Recipe]]):
        super().__init__()
        self.group, self.solved, self.width = group, solved, (len(solved),)
        ends = torch.tensor([0, *(linear.rows for linear in group.linears)]).cumsum(0).tolist()
        self.rows = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def of_rows(self, gradient: Tensor, x: Tensor, member: int) -> Tensor:
        linear, rows = self.group.linears[member], self.rows[member]
        weight = self.tensors[linear.weight].T if linear.transposed else self.tensors[linear.weight]
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(torch.float32)  # [n, N']
        found, back = [], gradient @ weight.to(torch.float32)  # Wᵀ g [n, K]
        for solution, recipe in self.solved:
            solution = _on(solution, gradient.device)
            exact, x_quantized = operands(x.reshape(-1, x.shape[-1]), weight, solution, recipe)
            # g · (Q(W T⁻¹) Q(T x) − W x), without a product for each output
            error = (gradient @ decoded(solution, recipe, rows) * x_quantized).to(torch.float64).sum(-1)
            found.append(error - (back * exact).to(torch.float64).sum(-1))
        return torch.stack(found).to(torch.float32)


def _on(solution: GroupSolution, device: torch.device) -> GroupSolution:
    tensors = {f.name: v for f in dataclasses.fields(solution) if isinstance(v := getattr(solution, f.name), Tensor)}
    return dataclasses.replace(solution, **{name: tensor.to(device) for name, tensor in tensors.items()})


class Survey(Calibration):
    """The stage loop without rewriting."""

    @torch.no_grad()
    def survey(self, rungs: Mapping[str, Mapping], recipe: Recipe) -> list[Surveyed]:
        """Returns what each group with this recipe would lose by each rung: name -> settings."""
        chosen = {i for i, group in enumerate(self.groups) if group.experts is None and group.recipe == recipe}
        if not chosen:
            raise WushError("nothing to recommend: overrides give every linear settings of its own")
        held = self._hold_out()
        observing = [[_copy(stage.graph_module) for stage in variant.stages] for variant in self.variants]
        self.progress.at("token weights")
        whole = measure(self.variants, self.groups, chosen, self.windows, self.batch_size, self.run)
        weights = assigned(whole, self.groups, wanted_groups(self.groups), self.run)
        if weights.of_group:
            self.variants.weigh(weights)
        self._start()
        reached = {i for i in chosen if f"{self.groups[i].name}.weights" in whole}
        if not reached:
            raise WushError("nothing to recommend: no gradient of the model's results reaches a linear")
        recipes = [dataclasses.replace(recipe, **settings).resolved() for settings in rungs.values()]
        solved: dict[int, list[tuple[GroupSolution, Recipe]]] = {}
        self.progress.begin(2 * self.last * len(self.batches) + len(reached), self.device, "step")
        for number in range(self.last + 1):
            self.progress.at(self.stages[number].name)
            if self.groups_in[number]:
                own = self.groups_in[number]
                seen = self._retry_smaller(number, lambda number=number, own=own: self._observe(number, own))
                self.variants.remove_observers(number)
                loaded = self._load(number)
                for i in sorted(reached & set(self.groups_in[number])):
                    self.progress.at(self.stages[number].name, self.groups[i].name)
                    seen[i].sensitivity = weights.sensitivity.get(i)
                    solved[i] = [(self._solution(self.groups[i], loaded, seen[i], r), r) for r in recipes]
                    del seen[i]
                    self.progress.advance()
            if number < self.last:
                self._retry_smaller(number, lambda number=number: self._propagate(number))
            self._loaded = None
        self.loader.close()
        self.mover.close()
        for variant, graph_modules in zip(self.variants, observing, strict=False):
            for stage, graph_module in zip(variant.stages, graph_modules, strict=True):
                stage.graph_module = graph_module  # whose observers name the masks
        kl = self._predicted(solved, held)
        return [self._one(i, dict(zip(rungs, kl[i].tolist(), strict=True))) for i in sorted(solved)]

    def _solution(self, group: LinearGroup, loaded: dict, seen: Observation, recipe: Recipe) -> GroupSolution:
        """A rung's solution, kept where the model is."""
        weight = group.stacked_weight(loaded)
        found = solve(
            weight,
            recipe,
            name=group.name,
            moment=seen.moment,
            count=int(seen.count.sum()),
            sample=seen.sample,
            sensitivity=seen.sensitivity,
        )
        return _on(found, self.run.tensors.home)

    def _hold_out(self) -> list[Batch]:
        """Sets sequences aside, and returns them. Of fewer than two times `HELD` all serve for both."""
        single, counts = regroup(self.windows, 1), [sequences(batch) for batch in self.windows]
        if len(single) < 2 * HELD:
            return self.windows
        if None not in counts:
            self.batch_size = self.batch_size or max(counts)
        self.windows = [batch.inputs for i, batch in enumerate(single) if (i + 1) % HELD]
        held = [batch.inputs for batch in single[HELD - 1 :: HELD]]
        tokens = sum(batch.tokens() for batch in single[HELD - 1 :: HELD])
        return held[:: max(1, tokens // TOKENS)]

    def _predicted(self, solved: dict[int, list], windows: list[Batch]) -> dict[int, Tensor]:
        """Returns the predicted KL of each rung [R], in nats a token, by group number."""
        size, seed = pass_size(self.windows, self.batch_size), min(self.groups[i].recipe.seed for i in solved)
        samples = min(SAMPLES, max(1, TOKENS // sum(batch.tokens() for batch in regroup(windows, None))))
        taps = {i: ErrorTap(self.groups[i], own) for i, own in solved.items()}
        work = self.variants, set(solved), windows
        while True:
            sums, kept = dict.fromkeys(solved, 0.0), dict.fromkeys(solved, 0)
            self.progress.begin(samples * len(solved) * len(regroup(windows, size)), self.device, "step")
            self.progress.at("errors")
            try:
                for sample in range(samples):
                    for i, _, (dots, rows) in collected(*work, size, 0, seed + 1 + sample, self.run, taps.__getitem__):
                        sums[i], kept[i] = sums[i] + dots.to(torch.float64).square().sum(-1).cpu(), kept[i] + rows
                        self.progress.advance()
                return {i: 0.5 * sums[i] / kept[i] for i in solved}
            except torch.OutOfMemoryError:
                if (size or 1) == 1:
                    raise
                size //= 2
                torch.cuda.empty_cache()

    def _one(self, i: int, kl: dict[str, float]) -> Surveyed:
        group = self.groups[i]
        members = tuple(linear.name for linear in group.linears)
        return Surveyed(members, sum(linear.rows for linear in group.linears), group.width, kl)


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(graph_module.graph, copies))
    return fx.GraphModule(graph_module, graph)
