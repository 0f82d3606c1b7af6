"""The loss of a solved layer on rows of its input (SPEC §5, eq. 1 and 4)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import formats
from ..config import WushConfig
from .transforms import apply_blockwise

if TYPE_CHECKING:
    from . import GroupSolution


def layer_loss(x: Tensor, weight: Tensor, solution: "GroupSolution", config: WushConfig) -> tuple[float, float]:
    """‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² / (n N), and the same relative to ‖X Wᵀ‖² / (n N).

    x [n, K]: rows of the layer's input; weight [N, K]: the original one. Products in fp32, sums in float64.
    """
    x = x.to(weight.device, torch.float32)
    weight = weight.to(torch.float32)
    t = None if solution.transform is None else solution.transform.to(torch.float32)
    values = apply_blockwise(x.T, t).T.contiguous()                         # X Tᵀ [n, K]
    g = solution.input_global_scale
    packed, scale = formats.quantize(values, config.format, config.activation_scale_rule, g)
    x_quantized = formats.dequantize(packed, scale, config.format, g)       # [n, K]
    w_quantized = formats.dequantize(
        solution.weight_packed, solution.weight_scale, config.format, solution.weight_global_scale
    )                                                                       # [N, K]
    reference = x @ weight.T                                                # [n, N]
    error = (reference - x_quantized @ w_quantized.T).to(torch.float64).square().sum()
    power = reference.to(torch.float64).square().sum()
    return float(error / reference.numel()), float(error / power.clamp(min=1e-300))
