"""The block transform alone in Triton: x times every block's matrix, rounded once to x's dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .transform_quantize import dense_rows, dot, load_operand, load_rows

ROWS, WARPS = 64, 4


@triton.jit(do_not_specialize=["M"])
def block_transform_kernel(
    x,
    t,
    out,
    M,
    pitch,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    B: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
):
    """x [M, K], its rows STRIDE apart (0: `pitch`), t [K/B or 1, B, B] -> out [M, K]. A program takes R rows of one
    block, so that a NaN stays in its block."""
    stride = STRIDE if STRIDE > 0 else pitch
    first = tl.program_id(0) % (K // B) * B
    start = tl.program_id(0) // (K // B) * R
    row = start.to(tl.int64)
    left = M - start
    tile = load_rows(x + row * stride + first, 0, left, stride, first, K, R, B, True, True)
    y = dot(tile, load_operand(t, first, SHARED, B, B, K, True), WIDE, R, B)
    rows = tl.arange(0, R)[:, None]
    out += row * K + first
    tl.store(out + (rows * K + tl.arange(0, B)[None, :]), y.to(out.dtype.element_ty), mask=rows < left)


def block_transform(x: Tensor, transform: Tensor) -> Tensor:
    """x [.., K], transform [K/B, B, B] or [1, B, B] -> [.., K] in x's dtype: block b times T_bᵀ, fp32 sums. B a power
    of two from 16 to 128; x and transform of one dtype, on one GPU."""
    size, width = transform.shape[-1], x.shape[-1]
    if size not in (16, 32, 64, 128) or transform.dtype != x.dtype or transform.device != x.device:
        raise ValueError(f"no kernel for blocks of {size}, {transform.dtype} on {transform.device}, and x of {x.dtype}")
    if width % size or transform.shape[0] not in (1, width // size):
        raise ValueError(f"{transform.shape[0]} blocks of {size} do not cover width {width}")
    rows = dense_rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        dense = rows.stride(0) == width
        block_transform_kernel[(triton.cdiv(rows.shape[0], ROWS) * (width // size),)](
            rows,
            transform.contiguous(),
            out,
            rows.shape[0],
            rows.stride(0),
            width,
            width if dense else 0,
            size,
            transform.shape[0] == 1,
            x.dtype == torch.float32,
            ROWS,
            num_warps=WARPS,
        )
    return out
