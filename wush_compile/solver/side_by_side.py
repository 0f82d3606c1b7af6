"""Solves weights of one shape with one given transform, each with a second moment of its own: experts of a layer.

What is sequential in GPTQ runs for all of them at once: on a GPU one expert alone fills little of it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import formats
from ..phases import phase
from ..recipe import Recipe
from .gptq import gptq, rotate_
from .order import in_order, out_of_order
from .scales import calibrates_global_scale, global_scale
from .solution import GroupSolution, block_size, weight_rule
from .solve import check_weight, largest_of_groups, moment_over_rows, round_to_nearest
from .sweeps import sweep_
from .transforms import PANEL, apply_blockwise, damped_cholesky


class _Prepared(NamedTuple):
    """A weight, transformed: W̃ᵀ float64 [K, N], U and d of GPTQ, g, ‖W‖², how often damping was added."""

    w: Tensor
    unit: Tensor | None
    diagonal: Tensor | None
    g: Tensor | None
    power: Tensor
    tries: int


def _prepare(
    weight: Tensor,
    recipe: Recipe,
    moment: Tensor | None,
    count: float,
    name: str,
    t: Tensor | None,
    inverse: Tensor | None,
    order: Tensor | None,
) -> _Prepared:
    """T and T⁻¹ have their blocks in `order` already."""
    block, rule, unit, diagonal, tries = block_size(recipe, weight.shape[1]), weight_rule(recipe), None, None, 0
    check_weight(weight, name)
    w = in_order(weight.T, order).contiguous().to(torch.float64)  # Wᵀ [K, N]
    power = w.square().sum()
    if recipe.solver == "gptq":

        def again() -> Tensor:
            return moment_over_rows(moment, count, weight.device, name, order)  # H [K, K]

        with phase("Cholesky"):
            factor, tries = damped_cholesky(again(), recipe.damping, name, again=again, panel=max(PANEL, block))
        with phase("GPTQ"):
            unit, diagonal = rotate_(factor, t, block)
    w = apply_blockwise(w, None if inverse is None else inverse.mT)  # W̃ᵀ
    largest = rms = None
    if calibrates_global_scale(recipe.format, rule):
        largest, rms = largest_of_groups(w, recipe), w.square().mean().sqrt()
    return _Prepared(w, unit, diagonal, global_scale(recipe.format, rule, largest, rms, w.device), power, tries)


def sweep(
    w: Tensor,
    unit: Tensor,
    diagonal: Tensor,
    recipe: Recipe,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
) -> None:
    """`sweep_` as often as the recipe says, as a phase of its own."""
    if recipe.sweeps:
        with phase("sweeps"):
            sweep_(w, unit, diagonal, recipe.format, rule, g, codes, scales, error, recipe.sweeps)


def solve_side_by_side(
    weights: list[Tensor],
    recipe: Recipe,
    *,
    moments: list[Tensor | None],
    counts: list[float],
    names: list[str],
    transform: Tensor | None,
    inverse: Tensor | None,
    order: Tensor | None,
) -> list[GroupSolution]:
    """Solves weights [N, K] on their device, with a given T and T⁻¹ (float64); `solve` says what the others are.

    order: of blocks in GPTQ. Of the moments, each the sum over its `counts` rows, GPTQ alone makes use.
    """
    wide = None if transform is None else in_order(transform, order).to(torch.float64)
    inverse = in_order(inverse, order)
    given = zip(weights, moments, counts, names, strict=True)
    prepared = [_prepare(weight, recipe, m, n, name, wide, inverse, order) for weight, m, n, name in given]
    powers, tries, gs = [p.power for p in prepared], [p.tries for p in prepared], [p.g for p in prepared]
    rule, each = weight_rule(recipe), weights[0].shape[0]
    if recipe.solver == "rtn":
        with phase("packing"):
            results = [round_to_nearest(p.w, recipe.format, rule, p.g) for p in prepared]
    elif len(prepared) == 1:
        [p] = prepared
        with phase("GPTQ"):
            codes, scales, error = gptq(p.w, p.unit, p.diagonal, recipe.format, rule, p.g)
        sweep(p.w, p.unit, p.diagonal, recipe, rule, p.g, codes, scales, error)
        results = [(formats.pack(codes), scales, error)]
    else:
        w = torch.cat([p.w for p in prepared], 1)  # [K, E·N]
        unit, diagonal = (torch.stack([getattr(p, name) for p in prepared]) for name in ("unit", "diagonal"))
        del prepared
        g = None if gs[0] is None else torch.cat(gs)  # [E]
        with phase("GPTQ"):
            codes, scales, error = gptq(w, unit, diagonal, recipe.format, rule, g)
        sweep(w, unit, diagonal, recipe, rule, g, codes, scales, error)
        split = formats.pack(codes).split(each), scales.split(each), error.split(each, 1)
        results = [(packed.clone(), scale.clone(), e) for packed, scale, e in zip(*split, strict=True)]
    solutions = []
    for (packed, scale, error), power, g, again in zip(results, powers, gs, tries, strict=True):
        error = apply_blockwise(error, None if wide is None else wide.mT)
        report = {"damping_tries": again, "weight_error": float(error.square().sum() / power.clamp(min=1e-300))}
        if recipe.format == "nvfp4":
            report["weight_scales_saturated"] = int((scale == 0x7E).sum())
            report["weight_scales_subnormal"] = int((scale < 0x08).sum())
        packed, scale = out_of_order(packed, order, 1), out_of_order(scale, order, 1)
        block = block_size(recipe, weights[0].shape[1])
        solutions.append(GroupSolution(transform, block, packed, scale, g, None, report))
    return solutions
