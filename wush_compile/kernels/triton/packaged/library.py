"""The library's products in a graph: `linear.library`, without slices of the weight."""

import functools
import operator

import torch
from torch import Tensor

from ..linear.int8 import int8_upcast_kernel
from .launches import launch, tiles
from .operands import lane_order, upcast_bf16, upcast_both, upcast_fp8


def product(call, name: str) -> Tensor:
    """out [M, N] of a `linear.Call`; name: "library" or "bf16"."""
    if name == "library":
        y = _fp8(call)
        return y if call.residual is None else y + call.residual
    return _bf16(call) if call.activation == "same" else _bf16_activation(call)


def _fp8(call) -> Tensor:
    if call.activation == "fp8":
        x = lane_order(call.x, "halves")
        x_unit = call.x_scales.reshape(-1) if call.gx is None else call.x_scales.reshape(-1) / call.gx
        w, w_unit = upcast_fp8(call.w, call.w_scales, call.gw, e4m3=True)
    else:
        x, x_unit, w, w_unit = upcast_both(call.x, call.x_scales, call.gx, call.w, call.w_scales, call.gw)
    scales = x_unit.unsqueeze(1), w_unit.unsqueeze(0)
    return torch._scaled_mm(x, w.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _bf16(call) -> Tensor:
    # The library rounds once itself. No other rounding follows if only powers of two come after the sum.
    direct = call.out_dtype == torch.bfloat16 and call.bias is None and call.known.exact
    x = upcast_bf16(call.x, call.x_scales, call.gx if direct else None, call.format)
    w = upcast_bf16(call.w, call.w_scales, call.gw if direct else None, call.format)
    y = torch.mm(x, w.t()) if direct else torch.mm(x, w.t(), out_dtype=torch.float32)
    return _finish(y, call, direct)


def _finish(y: Tensor, call, direct: bool) -> Tensor:
    if not direct:
        factors = [g.to(torch.float32) for g in (call.gx, call.gw) if g is not None]
        if factors:
            y = y * (1.0 / functools.reduce(operator.mul, factors))
        if call.bias is not None:
            y = y + call.bias.to(torch.float32)
        y = y.to(call.out_dtype)
    return y if call.residual is None else y + call.residual


def _terms(t: Tensor) -> list[Tensor]:
    """As `linear.library._terms`."""
    if t.dtype == torch.bfloat16:
        return [t]
    high = t.to(torch.bfloat16)
    return [high, (t - high.to(t.dtype)).to(torch.bfloat16)]


def _int8_weight(call, dtype: torch.dtype) -> Tensor:
    (_, n, k), block_n, block_k = call.sizes, 16, 512
    return launch(
        int8_upcast_kernel,
        ("out",),
        (tiles(n, block_n), tiles(k, block_k)),
        4,
        w=call.w.view(torch.int8),
        w_scales=call.w_scales,
        out=call.w.new_empty((n, k), dtype=dtype),
        N=n,
        K=k,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )["out"]


def _bf16_activation(call) -> Tensor:
    """Activations of 8 or 16 bits, as `linear.library._run_bf16_activation`."""
    fp8 = call.activation == "fp8"
    x = call.x.view(torch.float8_e4m3fn).to(torch.bfloat16) if fp8 else call.x
    xs = [x] if call.format == "int8" else _terms(x)
    plain = call.bias is None and call.gx is None and call.gw is None
    direct = plain and not fp8 and len(xs) == 1 and call.out_dtype == xs[0].dtype
    w = _int8_weight(call, x.dtype) if call.format == "int8" else upcast_bf16(call.w, call.w_scales, None, call.format)
    if direct:
        return _finish(torch.mm(xs[0], w.t()), call, direct)
    y = sum(torch.mm(x, w.t(), out_dtype=torch.float32) for x in xs)
    return _finish(y * call.x_scales if fp8 else y, call, direct)
