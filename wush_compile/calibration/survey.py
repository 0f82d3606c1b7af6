"""Surveys a model for `recommend`: what each rung of precision costs each group, on the unquantized model.

The stages run as in calibration, but nothing is rewritten. Each group is solved once for each rung, and its error is
measured on rows of its input. One pass with gradients (`token_weights.py`) gives each group's effect on the model's
log-likelihood.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WushError
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation
from ..recipe import Recipe
from ..solver.loss import loss_rows
from ..solver.solve import solve
from .loop import Calibration
from .solve_group import LOSS_ROWS
from .token_weights import assigned, measure, wanted_groups


@dataclass(frozen=True)
class Surveyed:
    """A group: its members' names, its sizes, and the predicted KL of each rung, in nats a token."""

    members: tuple[str, ...]
    rows: int
    width: int
    kl: dict[str, float]


def row_error(group: LinearGroup, weight: Tensor, settings: Mapping, seen: Observation) -> float:
    """Returns the mean over rows of a sample of ‖error‖² / ‖output‖², with the group solved by other settings."""
    recipe = dataclasses.replace(group.recipe, **settings).resolved()
    solution = solve(
        weight, recipe, name=group.name, moment=seen.moment, count=int(seen.count.sum()), sample=seen.sample
    )
    rows = seen.sample[:LOSS_ROWS]
    error, power = loss_rows(rows[rows.any(-1)], weight, solution, recipe)
    return float((error / power.clamp(min=1e-30)).clamp(max=1).mean())


class Survey(Calibration):
    """The stage loop without rewriting."""

    @torch.no_grad()
    def survey(self, rungs: Mapping[str, Mapping], recipe: Recipe) -> list[Surveyed]:
        """Returns what each group with this recipe would lose by each rung: name -> settings."""
        chosen = {i for i, group in enumerate(self.groups) if group.experts is None and group.recipe == recipe}
        whole = measure(self.variants, self.groups, chosen, self.windows, self.batch_size, self.run)
        weights = assigned(whole, self.groups, wanted_groups(self.groups), self.run)
        if weights.of_group:
            self.variants.weigh(weights)
        self._start()
        found = []
        self.progress.begin(2 * self.last * len(self.batches), self.device, "batch")
        for number in range(self.last + 1):
            self.progress.at(self.stages[number].name)
            if self.groups_in[number]:
                seen = self._retry_smaller(number, lambda number=number: self._observe(number))
                self.variants.remove_observers(number)
                loaded = self._load(number)
                for i in sorted(chosen & set(self.groups_in[number])):
                    if (effect := whole.get(f"{self.groups[i].name}.effect")) is not None:
                        found.append(self._one(self.groups[i], loaded, seen.pop(i), float(effect), rungs))
            if number < self.last:
                self._retry_smaller(number, lambda number=number: self._propagate(number))
            self._loaded = None
        self.loader.close()
        self.mover.close()
        if not found:
            raise WushError("nothing to recommend: no gradient of the model's results reaches a linear")
        return found

    @staticmethod
    def _one(group: LinearGroup, loaded: dict, seen: Observation, effect: float, rungs: Mapping) -> Surveyed:
        weight = group.stacked_weight(loaded)
        # Half the curvature of the KL, with an error spread evenly over the outputs.
        kl = {name: 0.5 * effect * row_error(group, weight, settings, seen) for name, settings in rungs.items()}
        return Surveyed(tuple(linear.name for linear in group.linears), weight.shape[0], group.width, kl)
