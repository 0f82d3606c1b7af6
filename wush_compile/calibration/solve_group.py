"""Solves one group: computes its run-time module and a report from its weights and from what its observer saw."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..experts import ExpertGroup
from ..modules import Member, WushGroup
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation
from ..phases import phase
from ..solver.experts import experts_loss, solve_experts
from ..solver.loss import layer_loss
from ..solver.solve import solve

LOSS_ROWS = 512


@dataclass
class Solved:
    """A group's run-time module, and the measurements of its solution."""

    group: WushGroup
    report: dict


def members_of(group: LinearGroup) -> list[Member]:
    """Returns the row ranges of the group's linears in its stacked buffers."""
    members, start = [], 0
    for linear in group.linears:
        members.append(Member(linear.name, start, start + linear.rows, linear.bias is not None, linear.embeddings))
        start += linear.rows
    return members


def _loss_rows(seen: Observation) -> tuple[Tensor, Tensor | None]:
    """Rows of the uniform part of a sample, for layer losses, without the zero rows of empty slots; their experts."""
    rows = seen.sample[:LOSS_ROWS]
    filled = rows.any(-1)
    return rows[filled], None if seen.expert is None else seen.expert[:LOSS_ROWS, 0][filled].to(torch.int64)


def solve_group(group: LinearGroup, tensors: Mapping[str, Tensor], seen: Observation | None) -> Solved:
    """Computes the transform, codes and scales of one group.

    tensors   the model's tensors by name
    seen      what the group's observer saw; None solves without data
    """
    start = time.perf_counter()
    weight = group.stacked_weight(tensors)  # [N, K], of experts [E, N, K]
    moment, count, sample = (None, None, None) if seen is None else (seen.moment, seen.count, seen.sample)
    tokens = 0 if count is None else int(count.sum())
    if group.experts is None:
        solution = solve(weight, group.recipe, name=group.name, moment=moment, count=tokens, sample=sample)
    else:
        solution = solve_experts(weight, group.recipe, name=group.name, moment=moment, count=count, sample=sample)
    report = {**solution.report, "rows": weight.shape[-2], "width": group.width, "tokens": tokens}
    if group.experts is not None:
        report["experts"] = group.experts
        report["tokens_by_expert"] = [0] * group.experts if count is None else count.tolist()
    if seen is not None:
        rows, expert = _loss_rows(seen)
        if rows.shape[0]:
            with phase("layer losses"):
                losses = (
                    layer_loss(rows, weight, solution, group.recipe)
                    if expert is None
                    else experts_loss(rows, expert, weight, solution, group.recipe)
                )
            if not all(map(math.isfinite, losses)):  # weights and rows are finite: only a rounding can overflow
                raise NonFiniteError(
                    f"{group.name}: its transformed activations overflow {str(weight.dtype).removeprefix('torch.')}: "
                    "convert the model to bfloat16, or give activation_format 'fp8'"
                )
            report["loss"], report["relative_loss"] = losses
    buffers = {
        "weight_packed": solution.weight_packed,
        "weight_scale": solution.weight_scale,
        "weight_global_scale": solution.weight_global_scale,
        "input_transform": solution.transform,
        "input_global_scale": solution.input_global_scale,
        "bias": group.stacked_bias(tensors),
    }
    report["seconds"] = round(time.perf_counter() - start, 4)
    buffers = {name: None if buffer is None else buffer.contiguous() for name, buffer in buffers.items()}
    kind = WushGroup if group.experts is None else ExpertGroup
    return Solved(kind(members_of(group), group.recipe, solution.transform_block_size, buffers), report)
