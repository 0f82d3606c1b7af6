"""The loss of a solved layer on rows of its input (docs/spec.md §5, eq. 1 and 4)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import formats
from ..feedback import quantize
from ..recipe import Recipe
from .transforms import apply_blockwise

# Weights decoded at a time: a decoded weight and the temporaries of decoding are many times the size of its 4 bits.
DECODED_ELEMENTS = 2**24

if TYPE_CHECKING:
    from .solution import GroupSolution


def layer_loss(x: Tensor, weight: Tensor, solution: "GroupSolution", recipe: Recipe) -> tuple[float, float]:
    """‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² / (n N), and the same relative to ‖X Wᵀ‖² / (n N).

    x [n, K]: rows of the layer's input. weight [N, K]: the original weight. Products are fp32, sums float64.
    """
    error, power = loss_sums(x, weight, solution, recipe)
    return float(error / (x.shape[0] * weight.shape[0])), float(error / power.clamp(min=1e-300))


def loss_sums(x: Tensor, weight: Tensor, solution: "GroupSolution", recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The two sums of squares of `layer_loss`, ‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² and ‖X Wᵀ‖²: float64 []."""
    error, power = loss_rows(x, weight, solution, recipe)
    return error.sum(), power.sum()


def loss_rows(x: Tensor, weight: Tensor, solution: "GroupSolution", recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The two sums of squares of `layer_loss` for each row of x: float64 [n]."""
    x, x_quantized = operands(x, weight, solution, recipe)
    error = power = torch.zeros(x.shape[0], dtype=torch.float64, device=weight.device)
    step = max(1, DECODED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        reference = x @ weight[rows].to(torch.float32).T  # [n, N']
        found = x_quantized @ decoded(solution, recipe, rows).T
        error = error + (reference - found).to(torch.float64).square().sum(-1)
        power = power + reference.to(torch.float64).square().sum(-1)
    return error, power


def operands(x: Tensor, weight: Tensor, solution: "GroupSolution", recipe: Recipe) -> tuple[Tensor, Tensor]:
    """x [n, K] and Q(X Tᵀ) [n, K], both fp32 on the weight's device."""
    x = x.to(weight.device, torch.float32)
    t = None if solution.transform is None else solution.transform.to(torch.float32)
    values = apply_blockwise(x.T, t).T.contiguous()  # X Tᵀ [n, K]
    if recipe.operand == "fp8":
        return x, formats.dequantize_fp8(*formats.quantize_fp8(values))
    if recipe.operand == "none":
        return x, values.to(weight.dtype).to(torch.float32)
    g = solution.input_global_scale
    packed, scale = quantize(values, recipe.format, recipe.activation_scale_rule, g, solution.input_feedback)
    return x, formats.dequantize(packed, scale, recipe.format, g)


def decoded(solution: "GroupSolution", recipe: Recipe, rows: slice) -> Tensor:
    """Rows of Q(W T⁻¹): fp32 [N', K]."""
    weight, scale, g = solution.weight_packed[rows], solution.weight_scale[rows], solution.weight_global_scale
    return formats.dequantize(weight, scale, recipe.format, g[rows] if g is not None and g.numel() > 1 else g)
