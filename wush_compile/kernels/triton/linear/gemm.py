"""Packed weights decoded in registers, straight into tensor-core products: for few rows, where weights are the traffic.

Weights are the left operand (outᵀ = W xᵀ), so the decoded tile goes from registers to the tensor core, and few
activation rows waste little. MXFP4 runs in fp8 e5m2. The group scales go into the exponents, relative to the row's
largest byte (docs/spec.md §8). A group more than 26 octaves below that byte counts as 26 octaves below, an error under
2^-24 of the row's maximum. NVFP4 runs in bf16, where every value times its scale is exact. So does MXFP4 where x has 16
bits, under the name mxfp4_bf16: bf16's exponents hold every scale relative to the row's largest.

With split-K each program stores its fp32 partial sums. The last one to arrive adds them up, always in the same order.
"""

import triton
import triton.language as tl

from ..common.decode import E5M2_UNIT, decode_bf16, decode_fp8, e4m3_factor_bf16, e8m0_factor_bf16
from ..common.epilogue import finish
from ..common.formats import e8m0_factor
from ..common.overlap import start_next, wait_inputs


@triton.jit
def _select_byte(words, selector):
    """The byte of an int32 that a `prmt` selector names."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [words, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def scale_words(
    scales,
    row,
    word,
    selectors,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    EACH: tl.constexpr = 4,
    ROW_WORDS: tl.constexpr = 0,
):
    """(words, selectors), each int32 [ROWS, EACH*WORDS]: where the bytes of EACH*WORDS groups are; selectors [EACH].
    ROW_WORDS > 0: words beyond a row are its last one.

    The selectors come from memory. The compiler pass that moves the decoding into the operand's layout looks through
    arithmetic down to loads, and no further."""
    each = tl.load(selectors + tl.arange(0, EACH))
    if WORDS == 1:
        at = word if ROW_WORDS == 0 else tl.minimum(word, ROW_WORDS - 1)
        v = tl.load(scales + row + at)[:, None]
        return tl.broadcast_to(v, (ROWS, EACH)), tl.broadcast_to(each[None, :], (ROWS, EACH))
    else:
        if ROW_WORDS == 0:
            at = row[:, None] + word + tl.arange(0, WORDS)[None, :]
        else:
            at = row[:, None] + tl.minimum(word + tl.arange(0, WORDS), ROW_WORDS - 1)[None, :]
        v = tl.load(scales + at)[:, :, None]
        v = tl.reshape(tl.broadcast_to(v, (ROWS, WORDS, EACH)), (ROWS, EACH * WORDS))
        return v, tl.reshape(tl.broadcast_to(each[None, None, :], (ROWS, WORDS, EACH)), (ROWS, EACH * WORDS))


@triton.jit
def _to_lanes(w, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """[ROWS, COLUMNS] -> the same with the 4 by 4 units of UNIT columns in every 16*UNIT transposed.

    A lane of four holds every fourth unit of an operand's row. After the transposition these four units were neighbours
    in memory: one wide load fetches them, and they share one scale, which is decoded once. x is stored in the same
    order (`upcast.py`)."""
    return tl.reshape(
        tl.permute(tl.reshape(w, (ROWS, COLUMNS // (16 * UNIT), 4, 4, UNIT)), (0, 1, 3, 2, 4)), (ROWS, COLUMNS)
    )


@triton.jit
def _over_lanes(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr):
    """A group's value for each of its bytes: [ROWS, COLUMNS/(4*UNIT)] -> [ROWS, COLUMNS], in `_to_lanes`'s order."""
    t = tl.reshape(t, (ROWS, COLUMNS // (16 * UNIT), 4))[:, :, None, :, None]
    return tl.reshape(tl.broadcast_to(t, (ROWS, COLUMNS // (16 * UNIT), 4, 4, UNIT)), (ROWS, COLUMNS))


@triton.jit
def decode(w, words, selectors, top, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Packed tile [ROWS, BLOCK_K/2] and its scale words [ROWS, BLOCK_K/G] -> two operand tiles [ROWS, BLOCK_K/2], which
    hold the same channels for x as for w. G is 16 for mxfp4_bf16 too."""
    HALF: tl.constexpr = BLOCK_K // 2
    if FORMAT == "mxfp4":
        e = tl.maximum(_select_byte(words, selectors) - top[:, None], -26)
        return decode_fp8(_to_lanes(w, ROWS, HALF, 4), _over_lanes(e, ROWS, HALF, 4))
    else:
        words = _over_lanes(words, ROWS, HALF, 2)
        selectors = _over_lanes(selectors, ROWS, HALF, 2)
        if FORMAT == "nvfp4":
            factor = e4m3_factor_bf16(words, selectors)
        else:
            factor = e8m0_factor_bf16(words, selectors, tl.broadcast_to(top[:, None], (ROWS, HALF)))
        a, b = decode_bf16(_to_lanes(w, ROWS, HALF, 2))
        return a * factor, b * factor


@triton.jit
def _row_maximum(scales, row, words, WORDS: tl.constexpr, ROWS: tl.constexpr):
    """Largest byte of rows of WORDS int32 words each: int32 [ROWS]."""
    top = tl.zeros((ROWS,), tl.int32)
    for i in tl.static_range(0, (WORDS + 31) // 32):
        at = i * 32 + tl.arange(0, 32)
        v = tl.load(scales + row[:, None] + words + at[None, :], mask=(at < WORDS)[None, :], other=0)
        m = tl.maximum(tl.maximum(v & 0xFF, (v >> 8) & 0xFF), tl.maximum((v >> 16) & 0xFF, (v >> 24) & 0xFF))
        top = tl.maximum(top, tl.max(m, axis=1))
    return top


@triton.jit
def wait_for(acc):
    """`acc`, once the tensor core has finished it.

    Otherwise Triton lets the loop's last product run on into the next iteration. The decoding there would overwrite
    registers that hold the product's left operand, because the ptxas of Triton 3.6 reuses them before the wait."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["M"])
def fused_gemm_kernel(
    x,
    x_scales,
    x_unit,
    gx,
    w,
    w_scales,
    w_top,
    gw,
    bias,
    residual,
    selectors,
    out,
    partials,
    arrivals,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROMOTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] from w uint8 [N, K/2], w_scales int32 [N, K/(4G)] (four scale bytes a word) and, for MXFP4, w_top
    uint8 [N].

    x: uint8 [M, K/2] with x_scales int32 [M, K/(4G)] if PACKED. Else [M, K] in lane order (`upcast.py`): e5m2 or e4m3
    where FORMAT is mxfp4, bf16 where FORMAT is mxfp4_bf16 or nvfp4. x_unit: fp32 [M], factors of x's rows, or None.
    selectors: int32 [4], `Workspace.selectors` (mxfp4) or `Workspace.pairs`; int32 [8], `Workspace.twice` (mxfp4_bf16).
    partials: fp32 [SPLIT_K, M, N]. arrivals: int32, one a tile, all zeros before and after.
    PROMOTE: channels whose products the tensor core sums itself before the sum goes to fp32, at most BLOCK_K/2; 0: all.
    Grid (tiles of N times tiles of M, SPLIT_K)."""
    G: tl.constexpr = 16 if FORMAT == "nvfp4" else 32
    EACH: tl.constexpr = 8 if FORMAT == "mxfp4_bf16" else 4
    HALF: tl.constexpr = BLOCK_K // 2
    WORDS: tl.constexpr = BLOCK_K // (4 * G)
    ROW_WORDS: tl.constexpr = K // (4 * G)
    PART_K: tl.constexpr = K // SPLIT_K
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    band = (pid // (GROUP_M * tiles_n)) * GROUP_M
    height = tl.minimum(tiles_m - band, GROUP_M)
    tile_m = band + (pid % (GROUP_M * tiles_n)) % height
    tile_n = (pid % (GROUP_M * tiles_n)) // height
    part = tl.program_id(1)
    start = part * PART_K
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_n = tl.minimum(n, N - 1)
    row_m = tl.minimum(m, M - 1)
    wait_inputs(PDL)
    top_n = row_n
    top_m = row_m
    if w_top is not None:
        top_n = tl.load(w_top + row_n).to(tl.int32)
        if PACKED:
            top_m = _row_maximum(x_scales, row_m * ROW_WORDS, start // (4 * G), PART_K // (4 * G), BLOCK_M)
    half = tl.arange(0, HALF)
    panel = half // 64 * 128 + half % 64
    w_row = w + row_n.to(tl.int64)[:, None] * (K // 2)
    # Rows beyond the last are not read: all programs would request the same few lines of memory at once.
    inside = m < M
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.range(0, PART_K // BLOCK_K, num_stages=STAGES):
        k = start + i * BLOCK_K
        codes = tl.load(w_row + (k // 2 + half)[None, :])
        words, picks = scale_words(w_scales, row_n * ROW_WORDS, k // (4 * G), selectors, WORDS, BLOCK_N, EACH)
        if PACKED:
            x_codes = tl.load(
                x + row_m.to(tl.int64)[:, None] * (K // 2) + (k // 2 + half)[None, :], mask=inside[:, None], other=0
            )
            x_words, x_picks = scale_words(x_scales, row_m * ROW_WORDS, k // (4 * G), selectors, WORDS, BLOCK_M)
            x0, x1 = decode(x_codes, x_words, x_picks, top_m, FORMAT, BLOCK_M, BLOCK_K)
            x0 = tl.trans(x0)
            x1 = tl.trans(x1)
        else:
            at = x + row_m.to(tl.int64)[None, :] * K + (k + panel)[:, None]
            x0 = tl.load(at, mask=inside[None, :], other=0.0)
            x1 = tl.load(at + 64, mask=inside[None, :], other=0.0)
        w0, w1 = decode(codes, words, picks, top_n, FORMAT, BLOCK_N, BLOCK_K)
        if PROMOTE > 0:
            acc = tl.dot(w0, x0, acc, max_num_imprecise_acc=PROMOTE)
            acc = tl.dot(w1, x1, acc, max_num_imprecise_acc=PROMOTE)
        else:
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
        acc = wait_for(acc)
    if FORMAT == "mxfp4":
        acc = acc * (e8m0_factor(top_n) * E5M2_UNIT)[:, None]
        if PACKED:
            acc = acc * (e8m0_factor(top_m) * E5M2_UNIT)[None, :]
    elif FORMAT == "mxfp4_bf16":
        acc = acc * e8m0_factor(top_n)[:, None]
    else:
        acc = acc * (16384.0 if PACKED else 128.0)  # each decoded operand is its value times 2^-7
    if x_unit is not None:
        acc = acc * tl.load(x_unit + row_m)[None, :]
    mask = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT_K == 1:
        finish(acc, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
    else:
        partial = partials + m.to(tl.int64)[None, :] * N + n[:, None]
        stride = tl.cast(M, tl.int64) * N  # M may be a constant
        tl.store(partial + part * stride, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals + tile_m * tiles_n + tile_n, 1, sem="acq_rel")
        if arrived == SPLIT_K - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for s in tl.static_range(SPLIT_K):
                total += tl.load(partial + s * stride, mask=mask, other=0.0, cache_modifier=".cg")
            finish(
                total, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask
            )
            tl.store(arrivals + tile_m * tiles_n + tile_n, 0)
    start_next(PDL)
