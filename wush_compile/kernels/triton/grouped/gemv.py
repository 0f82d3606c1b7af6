"""Few rows, each from an expert of its own: `linear.gemv` of one row, exact integer products of whole groups.

Two rows of one expert read its weights twice, the second time mostly from L2."""

import triton
import triton.language as tl

from ..common.epilogue import finish
from ..common.formats import e4m3_factor, e8m0_factor
from ..common.overlap import start_next, wait_inputs
from ..linear.gemv import load_weights, row_sums, weight_bytes
from ..linear.upcast import source_row
from .find import find_expert, store_zeros


@triton.jit(do_not_specialize=["T"])
def grouped_gemv_kernel(
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
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """x int32 [T, K/8], x_scales uint8 [T, K/G], w int32 [E, N, K/8], w_scales uint8 [E, N, K/G], gw fp32 [E], bias
    [E, N], offs int32 [E] -> out [S, N]. index: int [S], or None. Grid (tiles of N, S)."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1)
    wait_inputs(PDL)
    start_next(PDL)
    expert = find_expert(offs, m, E, EXPERTS)
    one = tl.zeros((BLOCK_N,), tl.int32) + m
    if expert == E:
        store_zeros(out, n, one, N, n < N)
    else:
        source = source_row(index, m, T)
        row = (tl.cast(expert, tl.int64) * N + tl.minimum(n, N - 1))[:, None]
        acc = tl.zeros((BLOCK_N, BLOCK_K // G), tl.float32)
        code, byte = load_weights(w, w_scales, row, 0, K, G, BLOCK_K)
        for i in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=1):
            first = i * BLOCK_K
            factor = e8m0_factor(byte) if FORMAT == "mxfp4" else e4m3_factor(byte)
            weights = weight_bytes(code)
            if BLOCK_K < K:  # load the next step while this one computes
                code, byte = load_weights(w, w_scales, row, first + BLOCK_K, K, G, BLOCK_K)
            acc += row_sums(weights, x, x_scales, source, first, K, G, BLOCK_N, BLOCK_K, FORMAT) * factor
        own_gw = gw + expert if SCALED_W else gw
        own_bias = bias + tl.cast(expert, tl.int64) * N if BIAS else bias
        finish(tl.sum(acc, 1), n, one, N, gx, own_gw, own_bias, None, out, SCALED_X, SCALED_W, BIAS, False, n < N)
