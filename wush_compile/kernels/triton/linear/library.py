"""Products by the library: both operands upcast into memory that is reused, then cuBLASLt (fp8) or cuBLAS (bf16)."""

import torch
from torch import Tensor

from ..common.memory import is_power_of_two
from .operands import Operands
from .upcast import upcast_bf16, upcast_both

# Memory that one call may take for an upcast weight. A larger weight goes to the library in slices.
SCRATCH_BYTES = 2**28


def weight_slices(n: int, row_bytes: int) -> list[slice]:
    """Slices of a weight's rows whose upcast fits the scratch memory."""
    step = max(SCRATCH_BYTES // row_bytes // 256 * 256, 256)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def run_library(o: Operands) -> Tensor:
    """bf16 [M, N] by fp8 products; MXFP4 whose weight fits e4m3. Takes no bias: the library rounds before it."""
    m, n, k = o.sizes
    y = torch.empty((m, n), dtype=torch.bfloat16, device=o.codes.device)
    for rows in weight_slices(n, k):
        x, x_unit, w, w_unit = upcast_both(
            o.codes, o.scales, o.global_scale, o.weight_codes[rows], o.weight_scales[rows], o.weight_global_scale
        )
        torch._scaled_mm(
            x,
            w.t(),
            x_unit[:, None],
            w_unit[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=not o.precise,
            out=y[:, rows],
        )
    return y if o.residual is None else y.add_(o.residual)


def run_bf16(o: Operands, out_dtype: torch.dtype) -> Tensor:
    """[M, N] by bf16 products: any width and any scale, the fallback for all others."""
    m, n, k = o.sizes
    gx, gw = o.global_scale, o.weight_global_scale
    # The library rounds once itself. No other rounding follows if only powers of two come after the sum.
    direct = out_dtype == torch.bfloat16 and o.bias is None and is_power_of_two(gx) and is_power_of_two(gw)
    x = upcast_bf16(o.codes, o.scales, gx if direct else None, o.format)
    y = torch.empty((m, n), dtype=torch.bfloat16 if direct else torch.float32, device=x.device)
    for rows in weight_slices(n, 2 * k):
        w = upcast_bf16(o.weight_codes[rows], o.weight_scales[rows], gw if direct else None, o.format)
        if direct:
            torch.mm(x, w.t(), out=y[:, rows])
        else:
            y[:, rows] = torch.mm(x, w.t(), out_dtype=torch.float32)
    if not direct:
        g = gx if gw is None else gw if gx is None else gx * gw
        if g is not None:
            y = y * (1.0 / g)
        if o.bias is not None:
            y = y + o.bias.to(torch.float32)
        y = y.to(out_dtype)
    return y if o.residual is None else y + o.residual
