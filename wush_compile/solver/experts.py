"""Solves one product of all experts of a layer: one transform for all of them, and GPTQ an expert.

A token goes to several experts. With one transform it is transformed and quantized once, before it is copied to them.
The transform follows from the moment of all rows and from the weights of all experts. GPTQ of an expert uses the moment
of the expert's own rows, shrunk towards the moment of all rows: (Σ_e xxᵀ + τ H̄) / (n_e + τ), H̄ the mean over all rows.
An expert without rows has H̄.
"""

import copy

import torch
from torch import Tensor

from ..errors import DataError, NonFiniteError
from ..phases import phase
from ..recipe import Recipe
from .choose import CLOSED_FORM, Transforms, block_gram, uses_conditional_moments
from .facts import moment_curves
from .loss import loss_sums
from .solution import GroupSolution, block_size
from .solve import input_global_scale, solve
from .transforms import PANEL, damped_cholesky, diagonal_blocks

# τ: the mean over all rows weighs as much as so many of an expert's own rows. Of 0, 32, 128, 512, 2048 and inf, 512 has
# the least loss or nearly so, from few tokens to many (benchmarks/trial_experts.py).
SHRINKAGE_ROWS = 512


def starved_experts(report: dict) -> list[int]:
    """The experts of a product's report that saw too few tokens for a moment of their own."""
    counts = report.get("tokens_by_expert")
    known = isinstance(counts, list) and report.get("tokens", 0) > 0
    return [e for e, count in enumerate(counts) if count < SHRINKAGE_ROWS] if known else []


def solve_experts(
    weights: Tensor, recipe: Recipe, *, moment: Tensor | None, count: Tensor | None, sample: Tensor | None, name: str
) -> GroupSolution:
    """Solves a product of all experts, on the device of `weights`, in float64. `solve` says what each argument is.

    weights [E, N, K]. moment: the sums of the experts' rows, fp32 [E, K, K] or [E, K/B, B, B]; count int64 [E]. The
    solution has weight_packed [E, N, K/2], weight_scale [E, N, K/G] and weight_global_scale [E]. Errors name an expert
    by its number: `name[3]`.
    """
    experts, _, width = weights.shape
    block, device = block_size(recipe, width), weights.device
    if moment is None and (recipe.solver == "gptq" or recipe.transform in CLOSED_FORM):
        raise DataError(f"{name}: {recipe.solver} with transform {recipe.transform} needs calibration data: pass data")
    for e in range(experts):
        if not torch.isfinite(weights[e]).all():
            raise NonFiniteError(
                f"{name}[{e}]: the weight holds NaN or Inf; repair the model or put the layer in ignore"
            )
    report, rows, pooled = {"damping_tries": 0}, [0] * experts, None
    if moment is not None:
        rows, pooled = count.tolist(), _pooled(moment, count, name)
    with phase("transforms"):
        shared, report["damping_tries"] = _transforms(weights, recipe, pooled, block, name)
    solutions = []
    for e in range(experts):
        own, n = None, 0.0
        if moment is not None:
            own, n = torch.add(moment[e], pooled, alpha=SHRINKAGE_ROWS), rows[e] + SHRINKAGE_ROWS
        solutions.append(
            solve(weights[e], recipe, moment=own, count=n, sample=None, name=f"{name}[{e}]", shared=shared)
        )
    t = shared[0]
    report["damping_tries"] = max(report["damping_tries"], *(s.report["damping_tries"] for s in solutions))
    report["weight_error"] = sum(s.report["weight_error"] for s in solutions) / experts
    for key in ("weight_scales_saturated", "weight_scales_subnormal"):
        if key in solutions[0].report:
            report[key] = sum(s.report[key] for s in solutions)
    h = None
    if pooled is not None:
        h = diagonal_blocks(pooled, block)
        report["input_power"] = moment_curves(h, t, block)
    g_x = input_global_scale(recipe, h, sample, t, block, device, name, report)
    g = solutions[0].weight_global_scale
    return GroupSolution(
        t,
        block,
        torch.stack([s.weight_packed for s in solutions]),
        torch.stack([s.weight_scale for s in solutions]),
        None if g is None else torch.cat([s.weight_global_scale for s in solutions]),
        g_x,
        report,
    )


def first_bad_expert(moment: Tensor) -> int | None:
    """The first expert whose moment [E, ..] has NaN or Inf; None if there is none."""
    bad = (~moment.diagonal(dim1=-2, dim2=-1).flatten(1).isfinite().all(-1)).nonzero()
    return int(bad[0]) if bad.numel() else None


def _pooled(moment: Tensor, count: Tensor, name: str) -> Tensor:
    """The mean moment of all rows, float64 [K, K] or [K/B, B, B]."""
    total = int(count.sum())
    if total <= 0:
        raise DataError(f"{name}: no calibration token reached these experts: give more data, or put them in ignore")
    if (bad := first_bad_expert(moment)) is not None:
        raise NonFiniteError(
            f"{name}[{bad}]: its calibration inputs hold NaN or Inf, or overflow fp32 when squared; "
            "repair the data or the model, or put the layer in ignore"
        )
    return moment.sum(0, dtype=torch.float64).div_(total)


def _transforms(
    weights: Tensor, recipe: Recipe, pooled: Tensor | None, block: int, name: str
) -> tuple[tuple[Tensor | None, Tensor | None], int]:
    """((T, T⁻¹) for all experts, how often damping was added)."""
    factor, tries = None, 0
    if uses_conditional_moments(recipe):
        factor, tries = damped_cholesky(
            pooled.clone(), recipe.damping, name, again=pooled.clone, panel=max(PANEL, block)
        )
    transforms = Transforms(recipe, pooled, block, weights.dtype, name)

    def gram() -> Tensor:  # the mean over all rows of all experts: [K/B, B, B]
        return sum(block_gram(w.T.to(torch.float64), block) for w in weights) / len(weights)

    shared = transforms.of_gram(weights.shape[-1], weights.device, gram, factor)
    return shared, max(tries, transforms.damping_tries)


def experts_loss(
    x: Tensor, expert: Tensor, weights: Tensor, solution: GroupSolution, recipe: Recipe
) -> tuple[float, float]:
    """`layer_loss` of rows x [n, K], each by the weight of its expert [n]: the mean square error, and its share."""
    error = power = torch.zeros((), dtype=torch.float64, device=weights.device)
    for e in expert.unique().tolist():
        one = copy.copy(solution)
        one.weight_packed, one.weight_scale = solution.weight_packed[e], solution.weight_scale[e]
        if solution.weight_global_scale is not None:
            one.weight_global_scale = solution.weight_global_scale[e : e + 1]
        own_error, own_power = loss_sums(x[expert == e], weights[e], one, recipe)
        error, power = error + own_error, power + own_power
    return float(error / (x.shape[0] * weights.shape[1])), float(error / power.clamp(min=1e-300))
