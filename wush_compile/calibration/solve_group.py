"""Solves one group of linears: its run-time module and a report, from its weights and from what its observer saw."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..modules import Member, WushGroup
from ..passes.calibration.group import LinearGroup
from ..passes.calibration.observe import Observation
from ..phases import phase
from ..solver.correction import corrected
from ..solver.loss import layer_loss
from ..solver.solve import check_weight, solve

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


def loss_rows(seen: Observation) -> tuple[Tensor, Tensor | None]:
    """Rows of the uniform part of a sample, for layer losses, without the zero rows of empty slots; their experts."""
    rows = seen.sample[:LOSS_ROWS]
    filled = rows.any(-1)
    return rows[filled], None if seen.expert is None else seen.expert[:LOSS_ROWS, 0][filled].to(torch.int64)


def check_losses(losses: tuple[float, float], name: str, dtype: torch.dtype) -> None:
    """Raises `NonFiniteError` unless losses are finite: weights and rows are, so a rounding or a sum overflowed."""
    if not all(map(math.isfinite, losses)):
        if dtype == torch.float16:
            raise NonFiniteError(
                f"{name}: its transformed activations overflow float16: convert the model to bfloat16, or give "
                "activation_format 'fp8'"
            )
        raise NonFiniteError(
            f"{name}: its outputs for calibration inputs overflow fp32, in which products add up: "
            "scale its weights or its inputs"
        )


def solve_group(group: LinearGroup, tensors: Mapping[str, Tensor], seen: Observation | None) -> Solved:
    """Computes the transform, codes and scales of one group of linears.

    tensors   the model's tensors by name
    seen      what the group's observer saw; None solves without data
    """
    start = time.perf_counter()
    weight = group.stacked_weight(tensors)  # [N, K]
    if seen is not None and seen.cross is not None:
        check_weight(weight, group.name)
        with phase("correction"):
            weight = corrected(weight, seen.moment, seen.cross, group.recipe, group.name)
    solution = solve(
        weight,
        group.recipe,
        name=group.name,
        moment=None if seen is None else seen.moment,
        count=0 if seen is None else int(seen.count),
        sample=None if seen is None else seen.sample,
        sensitivity=None if seen is None else seen.sensitivity,
    )
    report = {
        **solution.report,
        "rows": weight.shape[0],
        "width": group.width,
        "tokens": 0 if seen is None else int(seen.count),
    }
    rows = None if seen is None else loss_rows(seen)[0]
    if rows is not None and rows.shape[0]:
        with phase("layer losses"):
            losses = layer_loss(rows, weight, solution, group.recipe)
        check_losses(losses, group.name, weight.dtype)
        report["loss"], report["relative_loss"] = losses
    buffers = {
        "weight_packed": solution.weight_packed,
        "weight_scale": solution.weight_scale,
        "weight_global_scale": solution.weight_global_scale,
        "input_transform": solution.transform,
        "input_global_scale": solution.input_global_scale,
        "input_feedback": solution.input_feedback,
        "bias": group.stacked_bias(tensors),
    }
    report["seconds"] = round(time.perf_counter() - start, 4)
    buffers = {name: None if buffer is None else buffer.contiguous() for name, buffer in buffers.items()}
    return Solved(WushGroup(members_of(group), group.recipe, solution.transform_block_size, buffers), report)
