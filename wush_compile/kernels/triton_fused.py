"""The fused ops (`fused_ops.py`) in Triton: the quantizer with a prologue; row statistics in a kernel before it."""

import torch
import triton
from torch import Tensor

from .triton_launch import overlaps
from .triton_prologue import row_statistics_kernel
from .triton_quantize import Prologue, dense_rows, transform_quantize

ROW_COLUMNS = 4096                      # a program of `row_statistics` reads so many values at once


def row_statistics(x: Tensor, eps: float | Tensor, centered: bool) -> tuple[Tensor | None, Tensor]:
    """x [.., K] -> (mean fp32 [M] or None, scale fp32 [M]): 1/sqrt(mean(x²) + eps), centered: of x minus its mean."""
    rows = dense_rows(x)
    count, width = rows.shape
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(scale) if centered else None
    columns = min(ROW_COLUMNS, triton.next_power_of_2(width))
    pdl = overlaps(x.device.index)
    row_statistics_kernel[(count,)](
        rows, eps, mean, scale, count, rows.stride(0), width, centered, isinstance(eps, Tensor), 1, columns,
        pdl, num_warps=max(1, min(8, columns // 512)), **({"launch_pdl": True} if pdl else {}),
    )
    return mean, scale


def rms_norm_transform_quantize(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule
) -> tuple[Tensor, Tensor]:
    """`wush::rms_norm_transform_quantize`; the sum of squares has an order of its own."""
    if x.numel() == 0:
        return transform_quantize(x, transform, global_scale, format, scale_rule)
    _, scale = row_statistics(x, eps if eps_tensor is None else eps_tensor, False)
    prologue = Prologue(f"rms_{gain}", weight=weight, scale=scale)
    return transform_quantize(x, transform, global_scale, format, scale_rule, prologue=prologue)


def layer_norm_transform_quantize(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule
) -> tuple[Tensor, Tensor]:
    """`wush::layer_norm_transform_quantize`; the sums have an order of their own."""
    if x.numel() == 0:
        return transform_quantize(x, transform, global_scale, format, scale_rule)
    mean, scale = row_statistics(x, eps if eps_tensor is None else eps_tensor, True)
    prologue = Prologue("layer_norm", weight=weight, bias=bias, mean=mean, scale=scale)
    return transform_quantize(x, transform, global_scale, format, scale_rule, prologue=prologue)


def silu_mul_transform_quantize(gate, up, transform, global_scale, format, scale_rule) -> tuple[Tensor, Tensor]:
    """`wush::silu_mul_transform_quantize`."""
    return transform_quantize(gate, transform, global_scale, format, scale_rule, prologue=Prologue("silu_mul", up))


def gelu_mul_transform_quantize(
    gate, up, approximate, transform, global_scale, format, scale_rule
) -> tuple[Tensor, Tensor]:
    """`wush::gelu_mul_transform_quantize`; approximate: none or tanh."""
    prologue = Prologue("gelu_mul" if approximate == "none" else "gelu_tanh_mul", up)
    return transform_quantize(gate, transform, global_scale, format, scale_rule, prologue=prologue)
