"""Blackwell: `linear.scaled` with a tile's expert found from the offsets. Reads x packed, row by row where there is an
index."""

import triton
import triton.language as tl

from ..common.epilogue import finish
from ..linear.upcast import source_row
from .find import find_tile, store_zeros


@triton.jit(do_not_specialize=["S", "T"])
def grouped_scaled_kernel(
    x,
    x_scales,
    gx,
    index,
    w,
    w_scales,
    gw,
    offs,
    bias,
    out,
    S,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    G: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x uint8 [T, K/2], x_scales [T, K/G], w uint8 [E, N, K/2], w_scales [E, N, K/G], gw fp32 [E], bias [E, N] -> out
    [S, N]. Scales are uint8 (e8m0) or float8e4nv. index: int [S], or None and T is S.

    Grid (`find.most_tiles` times tiles of N)."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert, first, end = find_tile(offs, tl.program_id(0) // tiles_n, S, E, EXPERTS, BLOCK_M)
    m = first + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (m < end)[:, None] & (n < N)[None, :]
    if first < end:
        if expert == E:
            store_zeros(out, n[None, :], m[:, None], N, mask)
        else:
            row_m = source_row(index, tl.minimum(m, S - 1), T).to(tl.int64)[:, None]
            row_n = tl.cast(expert, tl.int64) * N + tl.minimum(n, N - 1)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                c = k // 2 + tl.arange(0, BLOCK_K // 2)
                g = k // G + tl.arange(0, BLOCK_K // G)
                if K % BLOCK_K == 0:
                    a = tl.load(x + row_m * (K // 2) + c[None, :])
                    b = tl.load(w + row_n[None, :] * (K // 2) + c[:, None])
                    sa = tl.load(x_scales + row_m * (K // G) + g[None, :])
                    sb = tl.load(w_scales + row_n[:, None] * (K // G) + g[None, :])
                else:
                    a = tl.load(x + row_m * (K // 2) + c[None, :], mask=(c < K // 2)[None, :], other=0)
                    b = tl.load(w + row_n[None, :] * (K // 2) + c[:, None], mask=(c < K // 2)[:, None], other=0)
                    sa = tl.load(x_scales + row_m * (K // G) + g[None, :], mask=(g < K // G)[None, :], other=0.0)
                    sb = tl.load(
                        w_scales + row_n[:, None] * (K // G) + g[None, :], mask=(g < K // G)[None, :], other=0.0
                    )
                acc = tl.dot_scaled(a, sa, "e2m1", b, sb, "e2m1", acc)
            own_gw = gw + expert if SCALED_W else gw
            own_bias = bias + tl.cast(expert, tl.int64) * N if BIAS else bias
            finish(
                acc,
                n[None, :],
                m[:, None],
                N,
                gx,
                own_gw,
                own_bias,
                None,
                out,
                SCALED_X,
                SCALED_W,
                BIAS,
                False,
                mask,
            )
