"""Blackwell: block-scaled FP4 products by `tl.dot_scaled`, which lowers to the native instruction there.

Takes the canonical layout in both formats. The dtype of the scales names the format: uint8 for e8m0 with groups of 32,
float8e4nv for e4m3 with groups of 16. On sm_100 the instruction needs 128 rows a program: with 64 rows Triton falls
back to f16 without a warning.
"""

import triton
import triton.language as tl

from ..common.epilogue import finish


@triton.jit(do_not_specialize=["M"])
def scaled_gemm_kernel(
    x,
    x_scales,
    gx,
    w,
    w_scales,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x uint8 [M, K/2], x_scales [M, K/G], w uint8 [N, K/2], w_scales [N, K/G] -> out [M, N].

    Grid (tiles of M times tiles of N)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = tl.minimum(m, M - 1).to(tl.int64)[:, None]
    row_n = tl.minimum(n, N - 1).to(tl.int64)
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
            sb = tl.load(w_scales + row_n[:, None] * (K // G) + g[None, :], mask=(g < K // G)[None, :], other=0.0)
        acc = tl.dot_scaled(a, sa, "e2m1", b, sb, "e2m1", acc)
    mask = (m < M)[:, None] & (n < N)[None, :]
    finish(acc, n[None, :], m[:, None], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
