"""Solves a product of experts in steps, so that several processes share its experts.

1. What all experts share: the transform, and what else activations are rounded with. One process computes it.
2. A share of the experts for each process.
3. Every process joins the shares.
"""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..experts import ExpertGroup
from ..modules import WushGroup
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation
from ..phases import phase
from ..solver.experts import experts_loss, join_reports, solve_share, solve_shared
from .solve_group import Solved, check_losses, loss_rows, members_of


class Common(nn.Module):
    """What all experts of a product share, as buffers, which travel between processes."""

    def __init__(self, transform: Tensor | None, input_feedback: Tensor | None, input_global_scale: Tensor | None):
        super().__init__()
        self.register_buffer("input_feedback", input_feedback)
        self.register_buffer("transform", transform)
        self.register_buffer("input_global_scale", input_global_scale)


def shares(experts: int, processes: int) -> list[range]:
    """The experts of each share, as equal as can be; no more shares than experts."""
    parts = min(experts, processes)
    ends = [experts * k // parts for k in range(parts + 1)]
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


def solve_common(group: LinearGroup, tensors: Mapping[str, Tensor], seen: Observation | None) -> Solved:
    """Computes what the experts of a product share. The result holds a `Common`."""
    start = time.perf_counter()
    weights = group.stacked_weight(tensors)  # [E, N, K]
    pooled, sample = (None, None) if seen is None else (seen.pooled, seen.sample)
    t, feedback, g_x, report = solve_shared(weights, group.recipe, pooled=pooled, sample=sample, name=group.name)
    return Solved(Common(t, feedback, g_x), report | {"seconds": time.perf_counter() - start})


def solve_experts_of(
    group: LinearGroup, tensors: Mapping[str, Tensor], seen: Observation | None, share: range, common: Solved
) -> Solved:
    """Computes codes and scales of some experts. The result holds an `ExpertGroup` of these alone, without biases."""
    start = time.perf_counter()
    weights = group.stacked_weight(tensors)  # [E, N, K]
    observed = (
        {"moment": None, "rows": None, "pooled": None}
        if seen is None
        else {"moment": seen.moment, "rows": seen.count.tolist(), "pooled": seen.pooled}
    )
    solution = solve_share(weights, group.recipe, common.group.transform, share, name=group.name, **observed)
    report = solution.report | {"sums": (0.0, 0.0)}
    if seen is not None:
        rows, expert = loss_rows(seen)
        solution.input_global_scale = common.group.input_global_scale
        solution.input_feedback = common.group.input_feedback
        with phase("layer losses"):
            own = weights[share.start : share.stop]
            report["sums"] = experts_loss(rows, expert - share.start, own, solution, group.recipe)
        check_losses(report["sums"], group.name, weights.dtype)
    buffers = {name: getattr(solution, name) for name in ("weight_packed", "weight_scale", "weight_global_scale")}
    none = dict.fromkeys(("input_transform", "input_global_scale", "input_feedback", "bias"))
    part = ExpertGroup(members_of(group), group.recipe, solution.transform_block_size, buffers | none)
    return Solved(part, report | {"seconds": time.perf_counter() - start})


def join_shares(
    group: LinearGroup, tensors: Mapping[str, Tensor], seen: Observation | None, common: Solved, parts: list[Solved]
) -> Solved:
    """Joins the shares of a product, in order, to its run-time module and its report."""
    first: WushGroup = parts[0].group

    def joined(name: str) -> Tensor | None:
        pieces = [getattr(part.group, name) for part in parts]
        return None if pieces[0] is None else torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    bias = group.stacked_bias(tensors)
    buffers = {
        "weight_packed": joined("weight_packed"),
        "weight_scale": joined("weight_scale"),
        "weight_global_scale": joined("weight_global_scale"),
        "input_transform": common.group.transform,
        "input_global_scale": common.group.input_global_scale,
        "input_feedback": common.group.input_feedback,
        "bias": None if bias is None else bias.contiguous(),
    }
    seconds = common.report.pop("seconds") + sum(part.report["seconds"] for part in parts)
    counts = [0] * group.experts if seen is None else seen.count.tolist()
    report = join_reports(common.report, [part.report for part in parts]) | {
        "rows": group.linears[0].rows,
        "width": group.width,
        "tokens": sum(counts),
        "experts": group.experts,
        "tokens_by_expert": counts,
    }
    error, power = (sum(part.report["sums"][k] for part in parts) for k in (0, 1))
    if power:
        rows = loss_rows(seen)[0].shape[0]
        report["loss"], report["relative_loss"] = error / (rows * group.linears[0].rows), error / power
    report["seconds"] = round(seconds, 4)
    return Solved(ExpertGroup(members_of(group), group.recipe, first.block_size, buffers), report)
