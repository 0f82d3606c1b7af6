"""Blackwell: block-scaled FP4 products by `tl.dot_scaled`, which lowers to the native instruction there.

Canonical layout in, both formats; the scale's dtype names the format: uint8 for e8m0 with groups of 32, float8e4nv for
e4m3 with groups of 16. On sm_100 the instruction needs 128 rows a program: with 64 Triton falls back to f16 silently.
"""

import triton
import triton.language as tl

from ..common.epilogue import finish


@triton.jit(do_not_specialize=["M"])
def scaled_gemm_kernel(
    x,
    xs,
    gx,
    w,
    ws,
    gw,
    bias,
    residual,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x uint8 [M, K/2], xs [M, K/G], w uint8 [N, K/2], ws [N, K/G] -> out [M, N]; grid (tiles of M times tiles of
    N)."""
    tiles_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) // tiles_m) * BN + tl.arange(0, BN)
    row_m = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        c = k // 2 + tl.arange(0, BK // 2)
        g = k // G + tl.arange(0, BK // G)
        if K % BK == 0:
            a = tl.load(x + row_m * (K // 2) + c[None, :])
            b = tl.load(w + row_n[None, :] * (K // 2) + c[:, None])
            sa = tl.load(xs + row_m * (K // G) + g[None, :])
            sb = tl.load(ws + row_n[:, None] * (K // G) + g[None, :])
        else:
            a = tl.load(x + row_m * (K // 2) + c[None, :], mask=(c < K // 2)[None, :], other=0)
            b = tl.load(w + row_n[None, :] * (K // 2) + c[:, None], mask=(c < K // 2)[:, None], other=0)
            sa = tl.load(xs + row_m * (K // G) + g[None, :], mask=(g < K // G)[None, :], other=0.0)
            sb = tl.load(ws + row_n[:, None] * (K // G) + g[None, :], mask=(g < K // G)[None, :], other=0.0)
        acc = tl.dot_scaled(a, sa, "e2m1", b, sb, "e2m1", acc)
    mask = (m < M)[:, None] & (n < N)[None, :]
    finish(acc, n[None, :], m[:, None], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
