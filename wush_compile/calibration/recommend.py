"""`recommend`: a rung of precision for each group of linears, the cheapest that a target allows.

What a rung costs in accuracy is predicted from one pass with gradients and from the group's own error (`survey.py`).
What it costs in time or memory comes from a model of the GPU: bytes over bandwidth, or operations over peak rate,
whichever is larger. It is no measurement. Both add up over the groups, so the choice is a path: begin with the cheapest
rung everywhere, and take the step with the most accuracy for its cost until the target is met.
"""

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..capture.export import capture
from ..capture.wrappers import unwrapped
from ..config import WushConfig
from ..errors import ConfigError, WushError, one_of
from ..formats import FORMATS, get_format
from ..passes.calibration.group import find_groups
from .context import Run
from .inputs import prepare_batches
from .progress import Progress
from .ranks import launched
from .survey import Survey, Surveyed
from .tensors import tensors_of

KEPT = "W16A16"


def rungs(format: str) -> dict[str, dict]:
    """The rungs beside 16 bits on both sides: name -> settings of a recipe."""
    return {
        "W4A4": {"format": format, "activation_format": "same"},
        "W4A8": {"format": format, "activation_format": "fp8"},
        "W4A16": {"format": format, "activation_format": None},
        "W8A16": {"format": "int8", "activation_format": None},
    }


@dataclass(frozen=True)
class Gpu:
    """Memory bandwidth, bytes/s, and dense tensor-core rates, operations/s; from the vendor's data sheets."""

    bandwidth: float
    bf16: float
    fp8: float
    fp4: float | None = None

    def rate(self, rung: str, format: str) -> float:
        """The rate of a rung's product. Without fp4 MXFP4 multiplies in fp8, NVFP4 in bf16 (docs/spec.md §8)."""
        if rung == "W4A4" and self.fp4 is not None:
            return self.fp4
        return self.fp8 if rung == "W4A8" or (rung == "W4A4" and format == "mxfp4") else self.bf16


GPUS = {
    "h100": Gpu(3.35e12, 989e12, 1979e12),
    "h200": Gpu(4.8e12, 989e12, 1979e12),
    "b200": Gpu(8e12, 2250e12, 4500e12, 9000e12),
    "rtx5090": Gpu(1.79e12, 210e12, 419e12, 1676e12),
    "rtx4090": Gpu(1.01e12, 165e12, 330e12),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a group's products on a GPU for a number of rows; without a GPU, bytes of its weights."""

    format: str
    gpu: Gpu | None
    batch_rows: int

    def __call__(self, group: Surveyed, rung: str) -> float:
        n, k, m = group.rows, group.width, self.batch_rows
        fmt = get_format(self.format)
        bits = {KEPT: 16.0, "W8A16": 8 + 16 / 32}.get(rung, 4 + 8 / fmt.group_size)
        held = n * k * bits / 8 + (2 * k * fmt.group_size if rung.startswith("W4") else 0)  # and the transform
        if self.gpu is None:
            return held
        return max((held + 2 * m * (k + n)) / self.gpu.bandwidth, 2 * m * n * k / self.gpu.rate(rung, self.format))


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
    """

    def __init__(self, groups: list[Surveyed], chosen: list[str], cost: Cost, config: WushConfig):
        self.groups, self.config = groups, config
        self.rungs = {group.members[0]: rung for group, rung in zip(groups, chosen, strict=True)}
        self.kl = sum(group.kl.get(rung, 0.0) for group, rung in zip(groups, chosen, strict=True))
        pairs = list(zip(groups, chosen, strict=True))
        self.share = sum(cost(g, rung) for g, rung in pairs) / sum(cost(g, KEPT) for g in groups)
        self._costs = [cost(g, rung) / cost(g, KEPT) for g, rung in pairs]
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
        """A table of the groups, with the predicted KL of every rung, and a line with the sums."""
        names = [*rungs(self.config.format)]
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("group", no_wrap=True)
        for heading in ("rows x width", "rung", *(f"KL {name}" for name in names), "cost / 16 bits"):
            table.add_column(heading, justify="right", no_wrap=True)
        for group, share in zip(self.groups, self._costs, strict=True):
            first, *others = group.members
            name = first + "".join(f"+{other.rpartition('.')[2]}" for other in others)
            losses = (f"{group.kl[rung]:.1e}" for rung in names)
            table.add_row(name, f"{group.rows} x {group.width}", self.rungs[first], *losses, f"{share:.2f}")
        console = Console(file=io.StringIO(), width=200, no_color=True)
        console.print(table)
        lines = [line.rstrip() for line in console.file.getvalue().splitlines() if line.strip()]
        counts = {rung: list(self.rungs.values()).count(rung) for rung in (*names, KEPT)}
        chosen = ", ".join(f"{count} {rung}" for rung, count in counts.items() if count)
        total = f"{chosen}; predicted KL {self.kl:.3g}, cost {self.share:.3f} of 16 bits"
        return "\n".join([*lines, total])


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
        rows (tokens at once), by its bandwidth and peak rates. Without a GPU, cost is the bytes of the weights.

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
    machine = None if gpu is None else GPUS[one_of("gpu", gpu, GPUS)]
    if launched():
        raise WushError("recommend runs on one process: call it before the processes start, and give all its result")
    groups = survey(model, data, config, tokenizer, progress, device, batch_size, activations_dir)
    cost = Cost(config.format, machine, rows)
    return Recommendation(groups, choose(groups, cost, max_kl, max_share), cost, config)


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
    shown = progress if isinstance(progress, Progress) else Progress(progress)
    where = tensors.home if device is None else torch.empty(0, device=device).device
    run = Run(tensors, where, shown, batch_size=batch_size, activations_dir=activations_dir)
    try:
        batches, _ = prepare_batches(model, data, config, tokenizer, shown.shown, run.device, None)
        captured = capture(model, batches)
        groups, _ = find_groups(captured.graph_module, model, config)
        if not groups:
            raise WushError(f"nothing to recommend for {type(model).__name__}: it has no linear to quantize")
        return Survey(captured, groups, batches, run).survey(rungs(config.format), config.recipe.resolved())
    finally:
        if shown is not progress:
            shown.close()
