"""Solves one product of all experts of a layer: one transform for all of them, and GPTQ an expert.

A token goes to several experts. With one transform it is transformed and quantized once, before it is copied to them.
The transform follows from the moment of all rows and from the weights of all experts. GPTQ of an expert uses the moment
of the expert's own rows, shrunk towards the moment of all rows: (Σ_e xxᵀ + τ H̄) / (n_e + τ), H̄ the mean over all rows.
An expert without rows has H̄. Blocks are rounded in the order of their power in H̄.
"""

import copy
import math

import torch
from torch import Tensor

from ..errors import DataError, NonFiniteError
from ..formats import WEIGHT_FORMATS
from ..phases import phase
from ..recipe import Recipe
from .choose import CLOSED_FORM, Transforms, block_gram, uses_conditional_moments
from .facts import moment_curves
from .loss import loss_sums
from .order import order_of_blocks
from .side_by_side import solve_side_by_side
from .solution import GroupSolution, block_size
from .solve import input_global_scale, solve
from .transforms import PANEL, damped_cholesky, diagonal_blocks

# What experts that are solved side by side may take of a GPU's memory.
BATCH_BYTES = 2e9
# τ: the mean over all rows weighs as much as so many of an expert's own rows. Of 0, 32, 128, 512, 2048 and inf, 512 has
# the least loss or nearly so, from few tokens to many (benchmarks/trial_experts.py).
SHRINKAGE_ROWS = 512


def starved_experts(report: dict, recipe: Recipe) -> list[int]:
    """The experts of a product's report that saw too few tokens for a moment of their own, if one is used."""
    counts = report.get("tokens_by_expert")
    known = isinstance(counts, list) and report.get("tokens", 0) > 0 and recipe.solver == "gptq"
    return [e for e, count in enumerate(counts) if count < SHRINKAGE_ROWS] if known else []


def solve_experts(
    weights: Tensor, recipe: Recipe, *, moment: Tensor | None, count: Tensor | None, sample: Tensor | None, name: str
) -> GroupSolution:
    """Solves a product of all experts, on the device of `weights`, in float64. `solve` says what each argument is.

    weights [E, N, K]. moment: the sums of the experts' rows, fp32 [E, K, K] or [E, K/B, B, B]; count int64 [E]. The
    solution has weight_packed [E, N, K/2], weight_scale [E, N, K/G] and weight_global_scale [E]. Errors name an expert
    by its number: `name[3]`.
    """
    pooled = None if moment is None else pooled_moment(moment, count, name)
    t, feedback, g_x, report = solve_shared(weights, recipe, pooled=pooled, sample=sample, name=name)
    rows = None if count is None else count.tolist()
    solution = solve_share(weights, recipe, t, range(len(weights)), moment=moment, rows=rows, pooled=pooled, name=name)
    solution.input_global_scale, solution.input_feedback = g_x, feedback
    solution.report = join_reports(report, [solution.report])
    return solution


def solve_shared(
    weights: Tensor, recipe: Recipe, *, pooled: Tensor | None, sample: Tensor | None, name: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None, dict]:
    """What all experts of a product share: (T, the numbers of rounding with feedback, the global scale of activations,
    report).

    pooled: the mean moment of all rows, float64. `solve_experts` says what the others are.
    """
    block, device = block_size(recipe, weights.shape[-1]), weights.device
    if pooled is None and (recipe.solver == "gptq" or recipe.transform in CLOSED_FORM):
        raise DataError(f"{name}: {recipe.solver} with transform {recipe.transform} needs calibration data: pass data")
    with phase("transforms"):
        t, feedback, tries = _transform(weights, recipe, pooled, block, name)
    report, h = {"damping_tries": tries}, None
    if pooled is not None:
        h = diagonal_blocks(pooled, block)
        report["input_power"] = moment_curves(h, t, block)
    g_x = input_global_scale(recipe, h, sample, t, block, device, name, report)
    return t, feedback, g_x, report


def expert_bytes(n: int, k: int) -> int:
    """About what GPTQ and its sweeps hold of an expert [N, K]: W̃, its error and the gradient, some of them twice for a
    moment, and L and U, all float64."""
    return 8 * (5 * n * k + 3 * k * k)


def _together(weights: Tensor, recipe: Recipe) -> int:
    """How many experts to solve side by side: a power of two. On a CPU one after the other, as fast and smaller."""
    _, n, k = weights.shape
    if not weights.is_cuda or recipe.solver != "gptq":
        return 1
    return 2 ** max(0, min(4, int(math.log2(max(1, BATCH_BYTES / expert_bytes(n, k))))))


def batches(share: range, together: int) -> list[range]:
    """A share in parts of at most so many experts. They begin at multiples of it, so that other shares of the same
    experts have the same parts, as far as they can."""
    ends = [e for e in range(share.start + 1, share.stop) if e % together == 0]
    return [range(start, end) for start, end in zip([share.start, *ends], [*ends, share.stop], strict=True)]


def solve_share(
    weights: Tensor,
    recipe: Recipe,
    transform: Tensor | None,
    share: range,
    *,
    moment: Tensor | None,
    rows: list[int] | None,
    pooled: Tensor | None,
    name: str,
) -> GroupSolution:
    """Solves the experts of a share, with the T of all. weights, moment and rows (their counts) are those of all."""
    inverse = None if transform is None else torch.linalg.inv_ex(transform.to(torch.float64)).inverse
    order, block = None, block_size(recipe, weights.shape[-1])
    if pooled is not None:
        order = order_of_blocks(recipe, diagonal_blocks(pooled, block))
    solutions = []
    for some in batches(share, _together(weights, recipe)):
        moments, counts = [None] * len(some), [0.0] * len(some)
        if moment is not None:
            moments = [torch.add(moment[e], pooled, alpha=SHRINKAGE_ROWS) for e in some]
            counts = [rows[e] + SHRINKAGE_ROWS for e in some]
        given = dict(moments=moments, counts=counts, names=[f"{name}[{e}]" for e in some])
        own = [weights[e] for e in some]
        if recipe.format in WEIGHT_FORMATS:
            given = zip(own, moments, counts, given["names"], strict=True)
            solutions += [solve(w, recipe, moment=m, count=n, sample=None, name=each) for w, m, n, each in given]
            continue
        solutions += solve_side_by_side(own, recipe, transform=transform, inverse=inverse, order=order, **given)
    report = {
        "damping_tries": max(s.report["damping_tries"] for s in solutions),
        "weight_error": [s.report["weight_error"] for s in solutions],
    }
    for key in ("weight_scales_saturated", "weight_scales_subnormal"):
        if key in solutions[0].report:
            report[key] = sum(s.report[key] for s in solutions)
    g = solutions[0].weight_global_scale
    return GroupSolution(
        transform,
        block,
        torch.stack([s.weight_packed for s in solutions]),
        torch.stack([s.weight_scale for s in solutions]),
        None if g is None else torch.cat([s.weight_global_scale for s in solutions]),
        None,
        report,
    )


def join_reports(shared: dict, shares: list[dict]) -> dict:
    """The report of a product, from that of what its experts share and those of the shares, in order."""
    errors = [error for share in shares for error in share["weight_error"]]
    report = {**shared, "weight_error": sum(errors) / len(errors)}
    report["damping_tries"] = max(part["damping_tries"] for part in (shared, *shares))
    for key in ("weight_scales_saturated", "weight_scales_subnormal"):
        if key in shares[0]:
            report[key] = sum(share[key] for share in shares)
    return report


def first_bad_expert(moment: Tensor) -> int | None:
    """The first expert whose moment [E, ..] has NaN or Inf; None if there is none."""
    bad = (~moment.diagonal(dim1=-2, dim2=-1).flatten(1).isfinite().all(-1)).nonzero()
    return int(bad[0]) if bad.numel() else None


def pooled_moment(moment: Tensor, count: Tensor, name: str) -> Tensor:
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


def _transform(
    weights: Tensor, recipe: Recipe, pooled: Tensor | None, block: int, name: str
) -> tuple[Tensor | None, Tensor | None, int]:
    """(T for all experts, its numbers of rounding with feedback, how often damping was added)."""
    factor, tries = None, 0
    if uses_conditional_moments(recipe):
        factor, tries = damped_cholesky(
            pooled.clone(), recipe.damping, name, again=pooled.clone, panel=max(PANEL, block)
        )
    transforms = Transforms(recipe, pooled, block, weights.dtype, name)

    def gram() -> Tensor:  # the mean over all rows of all experts: [K/B, B, B]
        return sum(block_gram(w.T.to(torch.float64), block) for w in weights) / len(weights)

    t, _ = transforms.of_gram(weights.shape[-1], weights.device, gram, factor)
    return t, transforms.feedback(), max(tries, transforms.damping_tries)


def experts_loss(
    x: Tensor, expert: Tensor, weights: Tensor, solution: GroupSolution, recipe: Recipe
) -> tuple[float, float]:
    """The sums of squares of rows x [n, K], each by the weight of its expert [n]: of the error, and of the output.

    weights and solution are of the experts of one share; rows of other experts, with other numbers, are left out.
    """
    error = power = torch.zeros((), dtype=torch.float64, device=weights.device)
    for e in expert.unique().tolist():
        if not 0 <= e < len(weights):
            continue
        one = copy.copy(solution)
        one.weight_packed, one.weight_scale = solution.weight_packed[e], solution.weight_scale[e]
        if solution.weight_global_scale is not None:
            one.weight_global_scale = solution.weight_global_scale[e : e + 1]
        own_error, own_power = loss_sums(x[expert == e], weights[e], one, recipe)
        error, power = error + own_error, power + own_power
    return float(error), float(power)
