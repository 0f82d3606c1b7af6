"""The gradient of a quantized linear, for training what stands around the linear (adapters, norms, embeddings).

Quantization of the input counts as the identity (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432). So
with the transform T and the dequantized weight W, the gradient is that of y = x Tᵀ Wᵀ + b:

    input   grad_y W T
    bias    grad_y, summed over the rows
    weight  none
"""

import torch
from torch import Tensor

from ..formats import channels, dequantize
from .core import block_transform


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What grad W is computed in. W is a transformed weight: it, and the product, may be too large for fp16 although
    the gradient, behind T, is not."""
    return torch.float32 if dtype == torch.float16 else dtype


class StraightThrough(torch.autograd.Function):
    """`wush::fp4_linear` of a quantized x, with gradients for x and for the bias.

    An op cannot have this gradient: codes are bytes, and autograd passes no gradient through bytes.
    """

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        transform: Tensor | None,
        global_scale: Tensor | None,
        weight_codes: Tensor,
        weight_scales: Tensor,
        weight_global_scale: Tensor | None,
        bias: Tensor | None,
        format: str,
        *layout: str,
    ) -> Tensor:
        """x [.., K], which was quantized to codes and scales -> [.., N] in x's dtype.

        layout   the last arguments of the op: (scale_layout, activation_format), or none
        """
        return torch.ops.wush.fp4_linear(
            codes,
            scales,
            global_scale,
            weight_codes,
            weight_scales,
            weight_global_scale,
            bias,
            None,
            format,
            x.dtype,
            *layout,
        )

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, _, _, transform, _, weight_codes, weight_scales, weight_global_scale, bias, ctx.format, *_ = inputs
        ctx.arguments = len(inputs)
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(transform, weight_codes, weight_scales, weight_global_scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [.., N] -> gradients of x [.., K] and of the bias [N]."""
        transform, weight_codes, weight_scales, weight_global_scale = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = dequantize(weight_codes, weight_scales, ctx.format, weight_global_scale)  # [N, K]
            dtype = _product_dtype(grad.dtype)
            grad_x = grad.to(dtype) @ weight.to(dtype)  # [.., K]
            if transform is not None:
                grad_x = block_transform(grad_x, transform.transpose(1, 2))
            grad_x = grad_x.to(ctx.dtype)
        if ctx.needs_input_grad[8]:
            rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
            grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, *[None] * 7, grad_bias, *[None] * (ctx.arguments - 9)


class ExpertsStraightThrough(torch.autograd.Function):
    """`wush::fp4_grouped_linear` of quantized rows x, with the same gradient for x; biases of experts have none."""

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scales: Tensor,
        transform: Tensor | None,
        global_scale: Tensor | None,
        weight_codes: Tensor,
        weight_scales: Tensor,
        weight_global_scale: Tensor | None,
        offs: Tensor,
        bias: Tensor | None,
        format: str,
        layout: tuple[str, ...],
        index: Tensor | None,
    ) -> Tensor:
        """x [T, K], which was quantized to codes and scales -> [S, N] in x's dtype.

        layout   (scale_layout, activation_format) of the op, or none
        index    int64 [S], which row of x is whose; None if x is [S, K]
        """
        return torch.ops.wush.fp4_grouped_linear(
            codes,
            scales,
            global_scale,
            weight_codes,
            weight_scales,
            weight_global_scale,
            offs,
            bias,
            format,
            x.dtype,
            *(layout or ("rows", "same")),
            index,
        )

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, _, _, transform, _, weight_codes, weight_scales, weight_global_scale, offs, _, ctx.format, _, index = inputs
        ctx.arguments, ctx.dtype, ctx.rows = len(inputs), x.dtype, x.shape[0]
        ctx.save_for_backward(transform, weight_codes, weight_scales, weight_global_scale, offs, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [S, N] -> the gradient of x [T, K]. Reads the offsets back, and decodes one weight after the other."""
        transform, codes, scales, weight_global_scale, offs, index = ctx.saved_tensors
        grad = grad.to(_product_dtype(grad.dtype))
        grad_x = grad.new_zeros((grad.shape[0], channels(codes, ctx.format)))
        ends = offs.tolist()
        for e, (start, end) in enumerate(zip([0, *ends], ends)):
            if start < end:
                g = None if weight_global_scale is None else weight_global_scale[e : e + 1]
                weight = dequantize(codes[e], scales[e], ctx.format, g)  # [N, K]
                grad_x[start:end] = grad[start:end] @ weight.to(grad.dtype)
        if index is not None:
            grad_x = grad_x.new_zeros((ctx.rows, grad_x.shape[1])).index_add_(0, index, grad_x)
        if transform is not None:
            grad_x = block_transform(grad_x, transform.transpose(1, 2))
        return grad_x.to(ctx.dtype), *[None] * (ctx.arguments - 1)
