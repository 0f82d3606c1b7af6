"""The stage loop: observe -> solve -> rewrite -> propagate, one decoder layer after the other.

1. Run every batch through the stage with observers in its graph: second moments and samples of each group's input.
2. Solve each group, and rewrite its linears in the stage's graph into quantized ones.
3. Run every batch through the rewritten stage: the next stage sees what the *quantized* model produces.

Nothing is installed in the model here; only one stage's moments and every batch's live values are in memory.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .capture import Captured
from .config import WushConfig
from .data import Batch
from .modules import Member, WushGroup
from .passes.group import LinearGroup
from .passes.observe import Observation, allocate, insert_observers, observed, remove_observers
from .passes.partition import Stage, partition
from .passes.rewrite import rewrite
from .solver import layer_loss, solve

log = logging.getLogger("wush_compile")
LOSS_ROWS = 512


@dataclass
class Solved:
    """A group's run-time module and what its solution was measured to be."""

    group: WushGroup
    report: dict


def members_of(group: LinearGroup) -> list[Member]:
    """Row ranges of the group's linears in its stacked buffers."""
    members, start = [], 0
    for linear in group.linears:
        members.append(Member(linear.name, start, start + linear.rows, linear.bias is not None))
        start += linear.rows
    return members


def _loss_rows(sample: Tensor) -> Tensor:
    """Rows of the uniform part of a sample, for layer losses; empty slots are zero and drop out."""
    rows = sample[:LOSS_ROWS]
    return rows[rows.any(-1)]


def solve_group(group: LinearGroup, model: nn.Module, config: WushConfig, seen: Observation | None) -> Solved:
    """Transform, codes and scales of one group, from what its observer saw (None: data-free)."""
    weight = group.stacked_weight(model)                                   # [N, K]
    solution = solve(
        weight, config, name=group.name,
        moment=None if seen is None else seen.moment,
        count=0 if seen is None else int(seen.count),
        sample=None if seen is None else seen.sample,
    )
    report = {**solution.report, "rows": weight.shape[0], "width": group.width,
              "tokens": 0 if seen is None else int(seen.count)}
    rows = None if seen is None else _loss_rows(seen.sample)
    if rows is not None and rows.shape[0]:
        report["loss"], report["relative_loss"] = layer_loss(rows, weight, solution, config)
    buffers = {name: getattr(solution, attribute) for name, attribute in (
        ("weight_packed", "weight_packed"), ("weight_scale", "weight_scale"),
        ("weight_global_scale", "weight_global_scale"), ("input_transform", "transform"),
        ("input_global_scale", "input_global_scale"),
    )}
    buffers["bias"] = group.stacked_bias(model)
    return Solved(WushGroup(members_of(group), config, solution.transform_block_size, buffers), report)


def _warn_if_short(groups: list[LinearGroup], tokens: int, config: WushConfig) -> None:
    if config.solver == "gptq" or config.moments == "conditional":
        wide = max(groups, key=lambda g: g.width)
        if tokens < wide.width:
            log.warning(
                "%d calibration tokens are fewer than the %d channels of %s: its second moment is rank-deficient and rests "
                "on damping; give at least %d tokens", tokens, wide.width, wide.name, 4 * wide.width,
            )


class _Run:
    """Every batch's live values; a stage is run over all of them, dead values are dropped."""

    def __init__(self, captured: Captured, batches: list[Batch], stages: list[Stage], device: torch.device, bar: tqdm):
        self.device, self.bar = device, bar
        self.values = [captured.flatten(i, b) for i, b in enumerate(batches)]
        self.last_use = {name: i for i, stage in enumerate(stages) for name in stage.inputs}

    def observe(self, stage: Stage) -> None:
        for values in self.values:
            stage.graph_module(*self._inputs(stage, values))
            self.bar.update()

    def propagate(self, number: int, stage: Stage) -> None:
        for values in self.values:
            outputs = stage.graph_module(*self._inputs(stage, values))
            values.update(zip(stage.outputs, outputs, strict=True))
            for name in [n for n in values if self.last_use.get(n, -1) <= number]:
                del values[name]
            self.bar.update()

    def _inputs(self, stage: Stage, values: dict[str, object]) -> list[object]:
        return [v.to(self.device) if isinstance(v, Tensor) else v for v in (values[name] for name in stage.inputs)]


@torch.no_grad()
def calibrate(
    model: nn.Module, captured: Captured, groups: list[LinearGroup], batches: list[Batch] | None,
    config: WushConfig, progress: bool = True,
) -> tuple[list[Solved], list[Stage]]:
    """Solves every group on the batches (None: without data); the model stays as it is.

    Returns the solved groups, in the order of `groups`, and the stages with rewritten graphs.
    """
    solved: list[Solved | None] = [None] * len(groups)
    device = next(model.parameters()).device
    if batches is None:
        for i, group in enumerate(tqdm(groups, desc="quantizing", unit="group", disable=not progress)):
            solved[i] = solve_group(group, model, config, None)
        return solved, []

    mask = next((p for p in captured.placeholders() if p.name == "attention_mask"), None)
    insert_observers(captured.graph_module, groups, config, mask)
    stages = partition(captured.graph_module)
    observing = [observed(stage.graph_module) for stage in stages]
    last = max(i for i, numbers in enumerate(observing) if numbers)
    steps = sum((bool(n) + (i < last)) * len(batches) for i, n in enumerate(observing[: last + 1]))
    with tqdm(total=steps, desc="quantizing", unit="batch", disable=not progress) as bar:
        run = _Run(captured, batches, stages, device, bar)
        for number, stage in enumerate(stages[: last + 1]):
            bar.set_postfix_str(stage.name)
            seen = {i: allocate(stage.graph_module, i, device) for i in observing[number]}
            if seen:
                run.observe(stage)
                if number == next(i for i, n in enumerate(observing) if n):
                    _warn_if_short(groups, int(next(iter(seen.values())).count), config)
                remove_observers(stage.graph_module)
            for i in list(seen):
                bar.set_postfix_str(f"{stage.name}: solving {groups[i].name.rpartition('.')[2]}")
                solved[i] = solve_group(groups[i], model, config, seen.pop(i))
                rewrite(stage.graph_module, groups[i], solved[i].group, f"wush_group_{i}")
                loss = solved[i].report.get("relative_loss", math.nan)
                bar.set_postfix_str(f"{stage.name}, loss {loss:.2e}")
            if number < last:
                run.propagate(number, stage)
    return solved, stages
