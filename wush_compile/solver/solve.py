"""Solves one group: its weights and second moment give its transform, codes and scales (docs/spec.md §2-4)."""

import torch
from torch import Tensor

from .. import formats
from ..errors import DataError, NonFiniteError
from ..phases import phase
from ..recipe import Recipe
from .choose import CLOSED_FORM, Transforms, uses_conditional_moments
from .facts import moment_curves
from .gptq import gptq, gptq_conditional, rotate_
from .order import in_order, moment_in_order, order_of_blocks, out_of_order
from .row_factors import row_factors
from .scales import calibrates_global_scale, global_scale
from .sensitivity import Sensitivity
from .solution import GroupSolution, block_size, weight_rule
from .sweeps import sweep_
from .transforms import PANEL, apply_blockwise, damped_cholesky, diagonal_blocks

# Weights rounded to nearest at a time: the temporaries of rounding are many times as large.
ROUNDED_ELEMENTS = 2**24


def solve(
    weight: Tensor,
    recipe: Recipe,
    *,
    moment: Tensor | None,
    count: float,
    sample: Tensor | None,
    name: str,
    sensitivity: Sensitivity | None = None,
) -> GroupSolution:
    """Solves one group on the device of `weight`, in float64.

    weight [N, K]: the stacked members, in the model dtype. moment: the sum XᵀX over `count` rows, fp32 [K, K] or
    [K/B, B, B] (see `moment_shape`); None if nothing depends on data. sample [R, K]: rows of X, in which zero rows are
    empty slots; None without data. `name` names the group in errors and seeds its random transforms. sensitivity: what
    errors of the input cost; None without gradients.
    Raises NonFiniteError for NaN or Inf in weight, moment or sample, DataError if data is needed and missing, and
    ConfigError if the model dtype cannot hold the transform.
    """
    block = block_size(recipe, weight.shape[1])
    check_weight(weight, name)
    if recipe.format in formats.WEIGHT_FORMATS:
        return _round(weight, recipe, block, moment_over_rows(moment, count, weight.device, name))
    if moment is None and (recipe.solver == "gptq" or recipe.transform in CLOSED_FORM):
        raise DataError(f"{name}: {recipe.solver} with transform {recipe.transform} needs calibration data: pass data")
    report = {"damping_tries": 0}
    rule, conditional = weight_rule(recipe), uses_conditional_moments(recipe)
    blocks = None if moment is None else diagonal_blocks(moment, block)
    h = moment_over_rows(blocks, count, weight.device, name)  # [K/B, B, B]
    order = factor = None
    if recipe.solver == "gptq" or conditional:
        order = order_of_blocks(recipe, h)

        def mean_moment() -> Tensor:  # H [K, K]
            return moment_over_rows(moment, count, weight.device, name, order)

        with phase("Cholesky"):  # H = L Lᵀ, damped once; L overwrites H
            factor, report["damping_tries"] = damped_cholesky(
                mean_moment(), recipe.damping, name, again=mean_moment, panel=max(PANEL, block)
            )
    w = in_order(weight.T, order).contiguous().to(torch.float64)  # Wᵀ [K, N]
    transforms = Transforms(recipe, h, block, weight.dtype, name, sensitivity)
    # GPTQ finds conditional transforms as it goes. The global scale of the weights is fixed before, from marginal ones.
    on_the_way = recipe.solver == "gptq" and conditional
    t = inverse = None
    if not on_the_way or calibrates_global_scale(recipe.format, rule):
        with phase("transforms"):
            t, inverse = transforms.all(w, factor if conditional and not on_the_way else None, order)
    power = w.square().sum()
    w_tilde = group_max = rms = None
    if not on_the_way or calibrates_global_scale(recipe.format, rule):
        own = in_order(inverse, order)
        w_tilde = apply_blockwise(w, None if own is None else own.mT)  # W̃ᵀ [K, N]
    if calibrates_global_scale(recipe.format, rule):
        group_max, rms = largest_of_groups(w_tilde, recipe), w_tilde.square().mean().sqrt()
    g = global_scale(recipe.format, rule, group_max, rms, w.device)
    factors = None  # of rows
    if recipe.factors_rows:
        with phase("row factors"):
            factors = row_factors(w_tilde, recipe.format, rule)
            w_tilde = w_tilde * factors

    def sweep(w_tilde: Tensor, unit: Tensor, diagonal: Tensor, codes: Tensor, scale: Tensor, error: Tensor) -> None:
        with phase("sweeps"):
            sweep_(w_tilde, unit, diagonal, recipe.format, rule, g, codes, scale, error, recipe.sweeps)

    if on_the_way:
        del w_tilde
        found = {}

        def transform_of(b: int, updated: Tensor) -> tuple[Tensor, Tensor]:
            with phase("transforms"):
                found[b] = transforms.one(b, factor, updated)
            return found[b][0][0].to(torch.float64), found[b][1][0]

        with phase("GPTQ"):
            codes, scale, error = gptq_conditional(w, factor, block, transform_of, recipe.format, rule, g)
        t, inverse = (torch.cat([found[b][side] for b in sorted(found)]) for side in (0, 1))
        wide = t.to(torch.float64)
        if recipe.sweeps:
            w_tilde, error = (apply_blockwise(x, inverse.mT) for x in (w, error))
            sweep(w_tilde, *rotate_(factor, wide, block), codes, scale, error)
            error = apply_blockwise(error, wide.mT)
        packed = formats.pack(codes)
    else:
        del w
        wide = None if t is None else in_order(t, order).to(torch.float64)
        if recipe.solver == "rtn":
            with phase("packing"):
                packed, scale, error = round_to_nearest(w_tilde, recipe.format, rule, g)
        else:
            with phase("GPTQ"):
                unit, diagonal = rotate_(factor, wide, block)
                codes, scale, error = gptq(w_tilde, unit, diagonal, recipe.format, rule, g)
            if recipe.sweeps:
                sweep(w_tilde, unit, diagonal, codes, scale, error)
            packed, scale = out_of_order(formats.pack(codes), order, 1), out_of_order(scale, order, 1)
        error = error if factors is None else error / factors
        error = apply_blockwise(error, None if wide is None else wide.mT)
    report["damping_tries"] = max(report["damping_tries"], transforms.damping_tries)
    report["weight_error"] = float(error.square().sum() / power.clamp(min=1e-300))
    if recipe.format == "nvfp4":
        report["weight_scales_saturated"] = int((scale == 0x7E).sum())
        report["weight_scales_subnormal"] = int((scale < 0x08).sum())
    if h is not None:
        report["input_power"] = moment_curves(h, t, block)
    g_x = input_global_scale(recipe, h, sample, t, block, weight.device, name, report)
    g = g if factors is None else factors
    return GroupSolution(t, block, packed, scale, g, g_x, report, transforms.feedback())


def check_weight(weight: Tensor, name: str) -> None:
    """Raises a `NonFiniteError` if a weight has NaN or Inf."""
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{name}: the weight holds NaN or Inf; repair the model or put the layer in ignore")


def _round(weight: Tensor, recipe: Recipe, block: int, h: Tensor | None) -> GroupSolution:
    """Weights [N, K] of 8 bits: rounded as they are, some rows at a time, since a head is larger than the others."""
    packed, scales, error, power = [], [], 0.0, 0.0
    for rows in weight.split(max(1, ROUNDED_ELEMENTS // weight.shape[1])):
        wide = rows.to(torch.float32)  # [n, K]
        codes, scale = formats.quantize(wide, recipe.format, recipe.weight_scale_rule)
        difference = wide - formats.dequantize(codes, scale, recipe.format)
        error += difference.square().sum(dtype=torch.float64)
        power += wide.square().sum(dtype=torch.float64)
        packed.append(codes)
        scales.append(scale)
    report = {"damping_tries": 0, "weight_error": float(error / power.clamp(min=1e-300))}
    if h is not None:
        report["input_power"] = moment_curves(h, None, block)
    return GroupSolution(None, block, torch.cat(packed), torch.cat(scales), None, None, report)


def moment_over_rows(
    moment: Tensor | None, count: float, device: torch.device, name: str, order: Tensor | None = None
) -> Tensor | None:
    """The mean moment over `count` rows, float64, a copy, with its blocks in this order; None without a moment."""
    if moment is None:
        return None
    if count <= 0:
        raise DataError(f"{name}: no calibration token reached this layer: give more data, or put the layer in ignore")
    if not torch.isfinite(moment).all():
        raise NonFiniteError(
            f"{name}: its calibration inputs hold NaN or Inf, or overflow fp32 when squared; "
            "repair the data or the model, or put the layer in ignore"
        )
    copy = moment.to(device, torch.float64, copy=True) if order is None else moment_in_order(moment, order)
    return copy.div_(count)


def round_to_nearest(w_tilde: Tensor, format: str, rule: str, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W̃ᵀ float64 [K, N], overwritten -> packed [N, K/2], scales [N, K/G], and the error W̃ᵀ − Q(W̃)ᵀ [K, N]."""
    packed, scales = [], []

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.is_cuda:  # one kernel with the same codes and scales
            return torch.ops.wush.transform_quantize(x, None, g, format, rule)
        return formats.quantize(x, format, rule, g)

    for chunk in w_tilde.split(max(1, ROUNDED_ELEMENTS // w_tilde.shape[0]), dim=1):  # [K, n]
        p, s = quantize(chunk.T.to(torch.float32).contiguous())
        chunk.sub_(formats.dequantize(p, s, format, g).T)
        packed.append(p)
        scales.append(s)
    return torch.cat(packed), torch.cat(scales), w_tilde


def largest_of_groups(x: Tensor, recipe: Recipe) -> Tensor:
    """[K, n], a row for each channel -> the largest magnitude of each group, [K/G, n]."""
    return x.unflatten(0, (-1, recipe.group_size)).abs().amax(1)


def input_global_scale(
    recipe: Recipe,
    h: Tensor | None,
    sample: Tensor | None,
    transform: Tensor | None,
    block: int,
    device: torch.device,
    name: str,
    report: dict,
) -> Tensor | None:
    """g of the activations. For nvfp4, reports the share of the sample's groups whose scale leaves e4m3's range."""
    if recipe.operand != recipe.format:
        return None  # fp8 and 16 bits have no global scale
    rule, group_max, rms = recipe.activation_scale_rule, None, None
    if recipe.format == "nvfp4":
        if sample is not None:
            rows = sample.to(device, torch.float32)
            rows = rows[(rows != 0).any(-1)]  # zero rows are empty slots
            t = None if transform is None else transform.to(torch.float32)
            group_max = largest_of_groups(apply_blockwise(rows.T, t), recipe)  # [K/G, R]
            if not torch.isfinite(group_max).all():
                raise NonFiniteError(f"{name}: its calibration inputs hold NaN or Inf; repair the data or the model")
        elif h is not None:
            moment = diagonal_blocks(h, block)  # [K/B, B, B]
            if transform is not None:
                moment = transform.to(torch.float64) @ moment @ transform.to(torch.float64).mT
            rms = moment.diagonal(dim1=-2, dim2=-1).mean().sqrt()
        elif calibrates_global_scale(recipe.format, rule):
            raise DataError(f"{name}: the global scale of nvfp4 activations needs calibration data: pass data")
    g = global_scale(recipe.format, rule, group_max, rms, device)
    if group_max is not None:
        scale = group_max * (g / formats.E2M1_MAX)
        report["input_scales_saturated"] = float((scale > formats.E4M3_MAX).double().mean())
        report["input_scales_subnormal"] = float(((scale < 2.0**-6) & (scale > 0)).double().mean())
    return g
