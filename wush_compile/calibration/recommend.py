"""`recommend`: a rung of precision for each group of linears, the cheapest that a target allows.

What a rung costs in accuracy is predicted from gradients and the group's own error (`survey.py`), and what it costs in
time or memory comes from a table (`costs.py`). Both add up over the groups, so the choice is a path: begin with the
cheapest rung everywhere, and take the step with the most accuracy for its cost until the target is met.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..capture.export import capture
from ..capture.wrappers import unwrapped
from ..config import WushConfig
from ..errors import ConfigError, WushError, one_of
from ..formats import FORMATS
from ..passes.calibration.group import find_groups
from .context import Run, without_autocast
from .costs import KEPT, Cost, machine, rungs
from .inputs import prepare_batches
from .progress import Progress
from .ranks import launched
from .survey import Survey, Surveyed
from .tensors import tensors_of


def _hull(points: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """(cost, kl, rung) -> those on the lower convex hull, by rising cost and falling KL."""
    hull: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        if len(hull) == 1 and point[0] == hull[0][0]:
            hull.pop()
        hull.append(point)
    return hull


def _gain(before: tuple, after: tuple) -> float:
    """KL saved for each unit of cost."""
    return (before[1] - after[1]) / max(after[0] - before[0], 1e-300)


def choose(groups: list[Surveyed], cost: Cost, max_kl: float | None, max_share: float | None) -> list[str]:
    """The rung of each group: the least cost for a KL of `max_kl`, or the least KL at a share of the cost at 16 bits.

    Raises `ConfigError` if even the cheapest rungs cost more than the share.
    """
    hulls = [
        _hull([(cost(g, KEPT), 0.0, KEPT), *((cost(g, rung), kl, rung) for rung, kl in g.kl.items())]) for g in groups
    ]
    at = [0] * len(groups)
    total, kl = sum(hull[0][0] for hull in hulls), sum(hull[0][1] for hull in hulls)
    limit = None if max_share is None else max_share * sum(cost(g, KEPT) for g in groups)
    if limit is not None and total > limit:
        least = total / limit * max_share
        raise ConfigError(f"even the cheapest rungs cost {least:.3f} of what 16 bits do: give a share above that")
    steps = sorted(
        (-_gain(before, after), i, j)
        for i, hull in enumerate(hulls)
        for j, (before, after) in enumerate(zip(hull, hull[1:], strict=False))
    )
    for _, i, j in steps:  # in each group the gains fall, so its steps come in order
        before, after = hulls[i][j], hulls[i][j + 1]
        if max_kl is not None and kl <= max_kl:
            break
        if at[i] != j or (limit is not None and total + after[0] - before[0] > limit):
            continue
        at[i], total, kl = j + 1, total + after[0] - before[0], kl + after[1] - before[1]
    return [hull[position][2] for hull, position in zip(hulls, at, strict=True)]


class Recommendation(Mapping):
    """Settings for `quantize(model, data, **recommendation)`: `overrides`, and `ignore` for what stays in 16 bits.

    rungs    the rung of each group, by the name of its first member
    kl       the predicted KL to the unquantized model, in nats a token
    share    the cost of the groups' linears, as a share of that at 16 bits
    groups   what was measured of each group
    cost     what cost is; as text, in words
    """

    def __init__(self, groups: list[Surveyed], chosen: list[str], cost: Cost, config: WushConfig, target: str = ""):
        self.groups, self.config, self.cost, self.target = groups, config, cost, target
        self.rungs = {group.members[0]: rung for group, rung in zip(groups, chosen, strict=True)}
        pairs = list(zip(groups, chosen, strict=True))
        self.kl = sum(group.kl.get(rung, 0.0) for group, rung in pairs)
        self._whole = sum(cost(g, KEPT) for g in groups)
        self.share = sum(cost(g, rung) for g, rung in pairs) / self._whole
        settings = rungs(config.format)
        own = {name: settings[rung] for g, rung in pairs if rung != KEPT for name in g.members}
        self._settings = {
            "overrides": {**config.overrides, **own},
            "ignore": (*config.ignore, *(name for g, rung in pairs if rung == KEPT for name in g.members)),
        }

    def __getitem__(self, name: str) -> object:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __str__(self) -> str:
        """A table: the groups with the predicted KL of every rung, then the sums; and lines that say what decided."""
        names = [*rungs(self.config.format)]
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("group", no_wrap=True)
        for heading in ("rows x width", "rung", *(f"KL {name}" for name in names), "cost / 16 bits"):
            table.add_column(heading, justify="right", no_wrap=True)
        for group in self.groups:
            first, *others = group.members
            name, rung = first + "".join(f"+{other.rpartition('.')[2]}" for other in others), self.rungs[first]
            losses = (f"{group.kl[each]:.1e}" for each in names)
            cost = f"{self.cost(group, rung) / self.cost(group, KEPT):.2f}"
            table.add_row(name, f"{group.rows} x {group.width}", rung, *losses, cost)
        counts = {rung: list(self.rungs.values()).count(rung) for rung in (*names, KEPT)}
        chosen = ", ".join(f"{count} {rung}" for rung, count in counts.items() if count)
        kl = {rung: sum(group.kl[rung] for group in self.groups) for rung in names}
        cost = {rung: sum(self.cost(group, rung) for group in self.groups) / self._whole for rung in names}
        table.add_row("all alike: KL", "", "", *(f"{kl[rung]:.3g}" for rung in names), "")
        table.add_row("all alike: cost / 16 bits", "", "", *(f"{cost[rung]:.3f}" for rung in names), "")
        console = Console(file=io.StringIO(), width=200, no_color=True)
        console.print(table)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
        lines.append(f"{chosen}; predicted KL {self.kl:.3g}, cost {self.share:.3f} of 16 bits{self.target}")
        lines.append(f"cost: {self.cost}{self._next()}")
        return "\n".join(lines)

    def _next(self) -> str:
        """In words: what the best step that was not taken would save, and what it costs."""
        steps = []
        for group in self.groups:
            rung = self.rungs[group.members[0]]
            now = (self.cost(group, rung), group.kl.get(rung, 0.0))
            others = [(self.cost(group, r), group.kl.get(r, 0.0), r) for r in (*group.kl, KEPT)]
            steps += [(_gain(now, other), now, other, rung) for other in others if other[0] > now[0]]
        gain, now, then, rung = max(steps, default=(0.0, None, None, ""))
        if gain <= 0:
            return ""
        more = (then[0] - now[0]) / self._whole
        return f"; the next step, {rung} to {then[2]}, would save KL {now[1] - then[1]:.1e} for {100 * more:.2g} % more"


def recommend(
    model: nn.Module,
    data: Iterable,
    config: WushConfig | None = None,
    *,
    max_kl: float | None = None,
    max_share: float | None = None,
    gpu: str | None = None,
    rows: int = 1,
    tokenizer=None,
    progress: bool | Progress = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    activations_dir: str | os.PathLike | None = None,
) -> Recommendation:
    """Chooses the precision of each group of linears: 4, 8 or 16 bits on either side. Does not change the model.

    model, data, config, tokenizer, progress, device, batch_size, activations_dir
        As for `quantize`. Groups to which an override of `config` gives other settings keep them.
    max_kl
        The predicted KL to the unquantized model, in nats a token, that may not be exceeded at the least cost.
    max_share
        Or: the cost that may not be exceeded, as a share of that of 16 bits, at the least KL.
    gpu, rows
        What cost is: the time of the products on a `h100`, `h200`, `b200`, `rtx5090` or `rtx4090` for this number of
        rows (tokens at once). Where the kernels were measured on that GPU (h200), it is by their times, else by the
        GPU's bandwidth and peak rates; `print` says which. `gpu` may also be the file of a table that
        benchmarks/rung_costs.py wrote on a GPU of your own. Without a GPU, cost is the bytes of the weights.

    Returns settings: `quantize(model, data, **recommend(model, data, max_kl=0.1))`. `print` shows them as a table.
    Raises `ConfigError` for a target that cannot be met, and `WushError` if no gradient reaches a linear.
    """
    config, model = config or WushConfig(), unwrapped(model)
    if (max_kl is None) == (max_share is None):
        raise ConfigError("give one target: max_kl (nats a token) or max_share (of the cost at 16 bits)")
    if not (max_kl is None or max_kl > 0) or not (max_share is None or 0 < max_share <= 1):
        raise ConfigError(f"max_kl is above 0 and max_share in (0, 1], not {max_kl} and {max_share}")
    if config.solver != "gptq":
        raise ConfigError(f"a recommendation is for solver gptq, not {config.solver}")
    one_of("format", config.format, FORMATS)
    if rows < 1:
        raise ConfigError(f"rows is a number of tokens at once, at least 1, not {rows}")
    cost = Cost(config.format, None if gpu is None else machine(str(gpu)), rows)
    for rung in (*rungs(config.format), KEPT):  # a table lacks some formats: better said before the survey
        cost(Surveyed((), 1, 1, {}), rung)
    if launched():
        raise WushError("recommend runs on one process: call it before the processes start, and give all its result")
    groups = survey(model, data, config, tokenizer, progress, device, batch_size, activations_dir)
    target = f" (target: KL {max_kl:g})" if max_share is None else f" (target: {max_share:g} of 16 bits)"
    return Recommendation(groups, choose(groups, cost, max_kl, max_share), cost, config, target)


@without_autocast()
def survey(
    model: nn.Module,
    data: Iterable,
    config: WushConfig,
    tokenizer=None,
    progress: bool | Progress = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    activations_dir: str | os.PathLike | None = None,
) -> list[Surveyed]:
    """What each group of a model would lose by each rung."""
    tensors = tensors_of(model)
    shown = progress if isinstance(progress, Progress) else Progress(progress, title="surveying")
    where = tensors.home if device is None else torch.empty(0, device=device).device
    run = Run(tensors, where, shown, batch_size=batch_size, activations_dir=activations_dir)
    try:
        batches, _ = prepare_batches(model, data, config, tokenizer, shown.shown, run.device, None)
        captured = capture(model, batches)
        groups, _ = find_groups(captured.graph_module, model, config)
        if not groups:
            raise WushError(f"nothing to recommend for {type(model).__name__}: it has no linear to quantize")
        # Rungs are compared on the same weights and inputs.
        groups = [replace(group, recipe=replace(group.recipe, correction=0.0)) for group in groups]
        recipe = replace(config.recipe.resolved(), correction=0.0)
        return Survey(captured, groups, batches, run).survey(rungs(config.format), recipe)
    finally:
        if shown is not progress:
            shown.close()
