"""INT4 products on int8 tensor cores.

A value is (c + ½) * scale, half an odd integer times the scale. So the sum of a group's products is an exact integer,
which is then multiplied by its two scales in fp32.

Runs on any GPU with int8 tensor cores (sm_80 and later). Weights stay 4 bits in memory. Every group costs one fp32
multiply-add for each value of the tile besides its products, so for many rows this saves memory, not time.
"""

import triton
import triton.language as tl

from ..common.epilogue import finish
from ..common.overlap import start_next, wait_inputs


@triton.jit
def _odd(codes):
    """Packed codes uint8 [rows, 16] -> the odd integers 2c + 1, int8 [rows, 32]."""
    low = ((((codes & 15) ^ 8).to(tl.int8) - 8) * 2 + 1).to(tl.int8)
    high = ((((codes >> 4) ^ 8).to(tl.int8) - 8) * 2 + 1).to(tl.int8)
    return tl.interleave(low, high)


@triton.jit(do_not_specialize=["M"])
def int4_gemm_kernel(
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
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """x uint8 [M, K/2], x_scales bf16 [M, K/32], w uint8 [N, K/2], w_scales bf16 [N, K/32] -> out [M, N].

    Grid (tiles of M times tiles of N)."""
    wait_inputs(PDL)
    start_next(PDL)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_m = tl.minimum(m, M - 1).to(tl.int64)
    row_n = tl.minimum(n, N - 1).to(tl.int64)
    byte = tl.arange(0, 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for group in tl.range(0, K // 32, num_stages=STAGES):
        w_codes = tl.load(w + row_n[:, None] * (K // 2) + (group * 16 + byte)[None, :])
        x_codes = tl.load(x + row_m[:, None] * (K // 2) + (group * 16 + byte)[None, :])
        w_scale = tl.load(w_scales + row_n * (K // 32) + group).to(tl.float32) * 0.25
        x_scale = tl.load(x_scales + row_m * (K // 32) + group).to(tl.float32)
        sums = tl.dot(_odd(w_codes), tl.trans(_odd(x_codes)), out_dtype=tl.int32)  # [BLOCK_N, BLOCK_M]
        acc += sums.to(tl.float32) * (w_scale[:, None] * x_scale[None, :])
    mask = (m < M)[None, :] & (n < N)[:, None]
    finish(acc, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
