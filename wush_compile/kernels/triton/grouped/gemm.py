"""Tensor-core products of tiles of experts' rows: `linear.gemm` with a tile's expert found from the offsets.

Operands and arithmetic are those of `linear.gemm.fused_gemm_kernel` with x upcast and without split-K: experts give
tiles enough."""

import triton
import triton.language as tl

from ..common.decode import E5M2_UNIT
from ..common.epilogue import finish
from ..common.formats import e8m0_factor
from ..common.overlap import start_next, wait_inputs
from ..linear.gemm import decode, scale_words, wait_for
from .find import find_tile, store_zeros


@triton.jit(do_not_specialize=["S"])
def grouped_gemm_kernel(
    x,
    x_unit,
    gx,
    w,
    w_scales,
    w_top,
    gw,
    offs,
    bias,
    selectors,
    out,
    S,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PROMOTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [S, N] from w uint8 [E, N, K/2], w_scales int32 [E, N, ceil(K/(4G))] (four scale bytes a word) and, for
    MXFP4, w_top uint8 [E, N].

    x [S, K rounded up to a multiple of 128] in lane order (`linear.upcast`): e5m2 or e4m3 where FORMAT is mxfp4, bf16
    where it is mxfp4_bf16 or nvfp4. BLOCK_K divides x's width. x_unit: fp32 [S], factors of x's rows, or None.
    gw: fp32 [E]. bias: [E, N]. selectors, PROMOTE: as in `linear.gemm`.
    Grid (`find.most_tiles` times tiles of N)."""
    G: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    EACH: tl.constexpr = 8 if FORMAT == "mxfp4_bf16" else 4
    HALF: tl.constexpr = BLOCK_K // 2
    WORDS: tl.constexpr = BLOCK_K // (4 * G)
    ROW_WORDS: tl.constexpr = (K // G + 3) // 4
    WIDTH: tl.constexpr = (K + 127) // 128 * 128
    TAIL: tl.constexpr = K % BLOCK_K != 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    wait_inputs(PDL)
    expert, first, end = find_tile(offs, tl.program_id(0) // tiles_n, S, E, EXPERTS, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = first + tl.arange(0, BLOCK_M)
    mask = (m < end)[None, :] & (n < N)[:, None]
    if first < end:
        if expert == E:
            store_zeros(out, n[:, None], m[None, :], N, mask)
        else:
            row_n = tl.cast(expert, tl.int64) * N + tl.minimum(n, N - 1)
            row_m = tl.minimum(m, S - 1)
            top = n
            if w_top is not None:
                top = tl.load(w_top + row_n).to(tl.int32)
            half = tl.arange(0, HALF)
            panel = half // 64 * 128 + half % 64
            w_row = w + row_n[:, None] * (K // 2)
            x_row = x + row_m.to(tl.int64)[None, :] * WIDTH
            inside = (m < end)[None, :]
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
                k = i * BLOCK_K
                if TAIL:
                    codes = tl.load(w_row + (k // 2 + half)[None, :], mask=(k // 2 + half < K // 2)[None, :], other=0)
                else:
                    codes = tl.load(w_row + (k // 2 + half)[None, :])
                words, picks = scale_words(
                    w_scales,
                    row_n * ROW_WORDS,
                    k // (4 * G),
                    selectors,
                    WORDS,
                    BLOCK_N,
                    EACH,
                    ROW_WORDS if TAIL else 0,
                )
                at = x_row + (k + panel)[:, None]
                x0 = tl.load(at, mask=inside, other=0.0)
                x1 = tl.load(at + 64, mask=inside, other=0.0)
                w0, w1 = decode(codes, words, picks, top, FORMAT, BLOCK_N, BLOCK_K)
                if PROMOTE > 0:
                    acc = tl.dot(w0, x0, acc, max_num_imprecise_acc=PROMOTE)
                    acc = tl.dot(w1, x1, acc, max_num_imprecise_acc=PROMOTE)
                else:
                    acc = tl.dot(w0, x0, acc)
                    acc = tl.dot(w1, x1, acc)
                acc = wait_for(acc)
            if FORMAT == "mxfp4":
                acc = acc * (e8m0_factor(top) * E5M2_UNIT)[:, None]
            elif FORMAT == "mxfp4_bf16":
                acc = acc * e8m0_factor(top)[:, None]
            else:
                acc = acc * 128.0  # each decoded weight is its value times 2^-7
            if x_unit is not None:
                acc = acc * tl.load(x_unit + row_m)[None, :]
            own_gw = gw + expert if SCALED_W else gw
            own_bias = bias + tl.cast(expert, tl.int64) * N if BIAS else bias
            finish(
                acc,
                n[:, None],
                m[None, :],
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
    start_next(PDL)
