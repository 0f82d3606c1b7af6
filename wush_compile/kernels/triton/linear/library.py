"""Products by the library: both operands upcast into memory that is reused, then cuBLASLt (fp8) or cuBLAS (bf16)."""

import contextlib
import threading
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from ....formats import dequantize
from ....ops.layouts import from_lanes
from ..common.epilogue import finish_kernel
from ..common.memory import is_power_of_two
from .lane_order import fp8_order
from .operands import Operands
from .upcast import upcast_bf16, upcast_both, upcast_fp8, upcast_int8

# Memory that one call may take for an upcast weight. A larger weight goes to the library in slices.
SCRATCH_BYTES = 2**28
# Held while cuBLAS's settings, which all threads share, are not those of the process.
_SETTINGS = threading.Lock()


def weight_slices(n: int, row_bytes: int) -> list[slice]:
    """Slices of a weight's rows whose upcast fits the scratch memory."""
    step = max(SCRATCH_BYTES // row_bytes // 256 * 256, 256)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


@contextlib.contextmanager
def sums_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """cuBLAS adds up the parts of a sum in fp32, in products of this dtype, bf16 or fp16. By PyTorch's default it may
    round each part to the dtype: it splits the sums of few results, and then errs 1.4 times as much."""
    matmul, kind = torch.backends.cuda.matmul, "bf16" if dtype == torch.bfloat16 else "fp16"
    name = f"allow_{kind}_reduced_precision_reduction"
    with _SETTINGS:
        kept = getattr(matmul, name), getattr(matmul, f"{name}_split_k")
        try:
            setattr(matmul, name, (False, kept[1]))
            yield
        finally:
            setattr(matmul, name, kept)


def run_library(o: Operands) -> Tensor:
    """bf16 [M, N] by fp8 products; MXFP4 whose weight fits e4m3. Takes no bias: the library rounds before it."""
    m, n, k = o.sizes
    y = torch.empty((m, n), dtype=torch.bfloat16, device=o.codes.device)
    if o.activation == "fp8":
        x = o.codes.view(torch.float8_e4m3fn) if o.lanes else fp8_order(o.codes, lane_order=False)
        x_unit = o.scales.view(-1) if o.global_scale is None else o.scales.view(-1) / o.global_scale
    for rows in weight_slices(n, k):
        if o.activation == "fp8":
            w, w_unit = upcast_fp8(*o.weight(rows), e4m3=True, lane_order=o.lanes)
        else:
            x, x_unit, w, w_unit = upcast_both(o.codes, o.scales, o.global_scale, *o.weight(rows))
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
    if o.activation != "same":
        return _run_bf16_activation(o, out_dtype)
    m, n, k = o.sizes
    gx, gw = o.global_scale, o.weight_global_scale
    # The library rounds once itself. No other rounding follows if only powers of two come after the sum.
    direct = out_dtype == torch.bfloat16 and o.bias is None and is_power_of_two(gx) and is_power_of_two(gw)
    if o.lanes:
        x = o.codes
        gw = gx if gw is None else gw if gx is None else gx * gw  # the weight is divided by both
    else:
        x = upcast_bf16(o.codes, o.scales, gx if direct else None, o.format)
    y = torch.empty((m, n), dtype=torch.bfloat16 if direct else torch.float32, device=x.device)
    for rows in weight_slices(n, 2 * k):
        weight = o.weight_codes[rows], o.weight_scales[rows]
        w = upcast_bf16(*weight, gw if direct else None, o.format, lane_order=o.lanes)
        if direct:
            with sums_in_fp32(x.dtype):
                torch.mm(x, w.t(), out=y[:, rows])
        else:
            y = _store(torch.mm(x, w.t(), out_dtype=torch.float32), y, rows)
    if not direct:
        return finish_sums(y, None, o, out_dtype)
    return y if o.residual is None else y + o.residual


def _store(part: Tensor, y: Tensor, rows: slice) -> Tensor:
    """y [M, N] with `part` in the columns `rows`; `part` itself, not copied, if these are all."""
    if part.shape == y.shape:
        return part
    y[:, rows] = part
    return y


def finish_sums(y: Tensor, unit: Tensor | None, o: Operands, out_dtype: torch.dtype) -> Tensor:
    """The epilogue of fp32 sums y [M, N], times unit fp32 [M, 1]: it reads them once."""
    (m, n), rows, columns = y.shape, 4, 512
    out = torch.empty((m, n), dtype=out_dtype, device=y.device)
    optional = unit, o.global_scale, o.weight_global_scale, o.bias, o.residual
    given = [t is not None for t in optional]
    finish_kernel[(triton.cdiv(m, rows), triton.cdiv(n, columns))](
        y, *optional, out, m, n, *given, rows, columns, num_warps=4
    )
    return out


def _terms(t: Tensor) -> list[Tensor]:
    """bf16 tensors whose sum is t: itself, or two for fp16, and for fp32 of at most 16 significant bits."""
    if t.dtype == torch.bfloat16:
        return [t]
    high = t.to(torch.bfloat16)
    return [high, (t - high.to(t.dtype)).to(torch.bfloat16)]


def _run_bf16_activation(o: Operands, out_dtype: torch.dtype) -> Tensor:
    """`run_bf16` for activations of 8 or 16 bits, and weights in any format. Every operand is exact in one or two bf16
    terms: two for fp16 activations, and for int4 weights. Weights of 8 bits are rounded to the activations' dtype."""
    m, n, k = o.sizes
    fp8 = o.activation == "fp8"
    codes = from_lanes(o.codes, "fp8") if o.lanes and fp8 else o.codes
    x = codes.view(torch.float8_e4m3fn).to(torch.bfloat16) if fp8 else codes
    xs = [x] if o.format == "int8" else _terms(x)
    plain = o.bias is None and o.global_scale is None and o.weight_global_scale is None
    direct = plain and not fp8 and len(xs) == 1 and o.format != "int4" and out_dtype == xs[0].dtype
    y = torch.empty((m, n), dtype=out_dtype if direct else torch.float32, device=o.codes.device)
    for rows in weight_slices(n, 2 * k):
        codes, scales = o.weight_codes[rows], o.weight_scales[rows]
        if o.format == "int4":
            ws = _terms(dequantize(codes, scales, o.format))
        elif o.format == "int8":
            ws = [upcast_int8(codes, scales, x.dtype)]
        else:
            ws = [upcast_bf16(codes, scales, None, o.format, lane_order=o.lanes and not fp8)]
        if direct:
            with sums_in_fp32(xs[0].dtype):
                torch.mm(xs[0], ws[0].t(), out=y[:, rows])
        else:
            y = _store(sum(torch.mm(x, w.t(), out_dtype=torch.float32) for x in xs for w in ws), y, rows)
    if not direct:
        return finish_sums(y, o.scales if fp8 else None, o, out_dtype)
    return y if o.residual is None else y + o.residual
