"""Packed weights decoded in registers, straight into tensor-core products: for batches where weights are the traffic.

Weights are the left operand (outᵀ = W xᵀ): the decoded tile goes from registers to the tensor core, and few activation
rows waste little. MXFP4 runs in fp8 e5m2 with the group scales folded into exponents relative to the row's largest byte
(SPEC §8); a group more than 26 octaves below it is taken for one 26 octaves below, an error under 2^-24 of the row's
maximum. NVFP4 runs in bf16, where every value times its scale is exact.

Splitting K over programs: each stores its fp32 part, the last one to arrive adds them up, always in the same order.
"""

import triton
import triton.language as tl

from ..common.decode import E5M2_UNIT, decode_bf16, decode_fp8, e4m3_factor_bf16
from ..common.epilogue import finish
from ..common.formats import e8m0_factor
from ..common.overlap import start_next, wait_inputs


@triton.jit
def _pick(words, selector):
    """The byte of an int32 that a `prmt` selector names."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [words, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _scale_words(scales, row, word, selectors, WORDS: tl.constexpr, R: tl.constexpr):
    """(words, selectors), each int32 [R, 4*WORDS]: where the bytes of 4*WORDS groups are. The selectors come from
    memory: the pass that moves the decoding into the operand's layout looks through arithmetic down to loads, and no
    further."""
    four = tl.load(selectors + tl.arange(0, 4))
    if WORDS == 1:
        v = tl.load(scales + row + word)[:, None]
        return tl.broadcast_to(v, (R, 4)), tl.broadcast_to(four[None, :], (R, 4))
    else:
        v = tl.load(scales + row[:, None] + word + tl.arange(0, WORDS)[None, :])[:, :, None]
        v = tl.reshape(tl.broadcast_to(v, (R, WORDS, 4)), (R, 4 * WORDS))
        return v, tl.reshape(tl.broadcast_to(four[None, None, :], (R, WORDS, 4)), (R, 4 * WORDS))


@triton.jit
def _to_lanes(w, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """[R, C] -> the same with the 4 by 4 units of B columns in every 16*B transposed.

    A lane of four has every fourth unit of an operand's row. Transposed it has four that were neighbours: the bytes of one
    scale, which is then decoded once for them, and one wide load. x has the same order (`triton_expand`)."""
    return tl.reshape(tl.permute(tl.reshape(w, (R, C // (16 * B), 4, 4, B)), (0, 1, 3, 2, 4)), (R, C))


@triton.jit
def _over_lanes(t, R: tl.constexpr, C: tl.constexpr, B: tl.constexpr):
    """A group's value for each of its bytes: [R, C/(4*B)] -> [R, C], in the order of `_to_lanes`."""
    t = tl.reshape(t, (R, C // (16 * B), 4))[:, :, None, :, None]
    return tl.reshape(tl.broadcast_to(t, (R, C // (16 * B), 4, 4, B)), (R, C))


@triton.jit
def _decode(w, words, selectors, top, MX: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Packed tile [R, BK/2], its scale words [R, BK/G] -> two operand tiles [R, BK/2], the same channels for x and
    w."""
    C: tl.constexpr = BK // 2
    if MX:
        e = tl.maximum(_pick(words, selectors) - top[:, None], -26)
        return decode_fp8(_to_lanes(w, R, C, 4), _over_lanes(e, R, C, 4))
    else:
        factor = e4m3_factor_bf16(_over_lanes(words, R, C, 2), _over_lanes(selectors, R, C, 2))
        a, b = decode_bf16(_to_lanes(w, R, C, 2))
        return a * factor, b * factor


@triton.jit
def _row_maximum(scales, row, words, WORDS: tl.constexpr, R: tl.constexpr):
    """Largest byte of rows of `WORDS` int32 words each: int32 [R]."""
    top = tl.zeros((R,), tl.int32)
    for i in tl.static_range(0, (WORDS + 31) // 32):
        at = i * 32 + tl.arange(0, 32)
        v = tl.load(scales + row[:, None] + words + at[None, :], mask=(at < WORDS)[None, :], other=0)
        m = tl.maximum(tl.maximum(v & 0xFF, (v >> 8) & 0xFF), tl.maximum((v >> 16) & 0xFF, (v >> 24) & 0xFF))
        top = tl.maximum(top, tl.max(m, axis=1))
    return top


@triton.jit
def _waited_for(acc):
    """`acc`, once the tensor core has finished it. Triton would let a loop's last product run on into the next iteration, whose
    decoding writes registers that hold its left operand: the ptxas of Triton 3.6 gives them away before the wait."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["M"])
def fused_gemm_kernel(
    x,
    xs,
    x_unit,
    gx,
    w,
    ws,
    w_top,
    gw,
    bias,
    residual,
    selectors,
    out,
    parts,
    count,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    MX: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out [M, N] from w uint8 [N, K/2], ws int32 [N, K/(4G)] (four scale bytes a word), w_top uint8 [N] (MXFP4: the
    largest byte of each row). x: uint8 [M, K/2] with xs int32 [M, K/(4G)] if PACKED, else e5m2 bytes [M, K] in panels
    (see `expand_fp8_kernel`; NVFP4: bf16, panels of `expand_bf16_kernel`) with x_unit fp32 [M] (MXFP4). parts fp32
    [SPLIT, M, N], count int32, all zeros before and after. PROMOTE: channels whose products the tensor core adds up
    itself before the sum goes to fp32 (at most BK/2; 0: all of them). Grid (tiles of N times tiles of M, SPLIT)."""
    G: tl.constexpr = 32 if MX else 16
    HALF: tl.constexpr = BK // 2
    WORDS: tl.constexpr = BK // (4 * G)
    ROW_WORDS: tl.constexpr = K // (4 * G)
    PART: tl.constexpr = K // SPLIT
    tiles_n = tl.cdiv(N, BN)
    tiles_m = tl.cdiv(M, BM)
    pid = tl.program_id(0)
    band = (pid // (GROUP * tiles_n)) * GROUP
    height = tl.minimum(tiles_m - band, GROUP)
    tile_m = band + (pid % (GROUP * tiles_n)) % height
    tile_n = (pid % (GROUP * tiles_n)) // height
    split = tl.program_id(1)
    start = split * PART
    n = tile_n * BN + tl.arange(0, BN)
    m = tile_m * BM + tl.arange(0, BM)
    row_n = tl.minimum(n, N - 1)
    row_m = tl.minimum(m, M - 1)
    wait_inputs(PDL)
    top_n = row_n
    top_m = row_m
    if MX:
        top_n = tl.load(w_top + row_n).to(tl.int32)
        if PACKED:
            top_m = _row_maximum(xs, row_m * ROW_WORDS, start // (4 * G), PART // (4 * G), BM)
    half = tl.arange(0, HALF)
    panel = half // 64 * 128 + half % 64
    w_row = w + row_n.to(tl.int64)[:, None] * (K // 2)
    # Rows beyond the last are not read: all programs would ask for the same few lines of memory at once.
    there = m < M
    acc = tl.zeros((BN, BM), tl.float32)
    for i in tl.range(0, PART // BK, num_stages=STAGES):
        k = start + i * BK
        codes = tl.load(w_row + (k // 2 + half)[None, :])
        words, picks = _scale_words(ws, row_n * ROW_WORDS, k // (4 * G), selectors, WORDS, BN)
        if PACKED:
            x_codes = tl.load(
                x + row_m.to(tl.int64)[:, None] * (K // 2) + (k // 2 + half)[None, :], mask=there[:, None], other=0
            )
            x_words, x_picks = _scale_words(xs, row_m * ROW_WORDS, k // (4 * G), selectors, WORDS, BM)
            x0, x1 = _decode(x_codes, x_words, x_picks, top_m, MX, BM, BK)
            x0 = tl.trans(x0)
            x1 = tl.trans(x1)
        else:
            at = x + row_m.to(tl.int64)[None, :] * K + (k + panel)[:, None]
            x0 = tl.load(at, mask=there[None, :], other=0.0)
            x1 = tl.load(at + 64, mask=there[None, :], other=0.0)
        w0, w1 = _decode(codes, words, picks, top_n, MX, BN, BK)
        if PROMOTE > 0:
            acc = tl.dot(w0, x0, acc, max_num_imprecise_acc=PROMOTE)
            acc = tl.dot(w1, x1, acc, max_num_imprecise_acc=PROMOTE)
        else:
            acc = tl.dot(w0, x0, acc)
            acc = tl.dot(w1, x1, acc)
        acc = _waited_for(acc)
    if MX:
        acc = acc * (e8m0_factor(top_n) * E5M2_UNIT)[:, None]
        if PACKED:
            acc = acc * (e8m0_factor(top_m) * E5M2_UNIT)[None, :]
        else:
            acc = acc * tl.load(x_unit + row_m)[None, :]
    else:
        acc = acc * (16384.0 if PACKED else 128.0)  # 2^-7 of each pattern
    mask = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT == 1:
        finish(acc, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
    else:
        part = parts + m.to(tl.int64)[None, :] * N + n[:, None]
        stride = tl.cast(M, tl.int64) * N  # M may be a constant
        tl.store(part + split * stride, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        arrived = tl.atomic_add(count + tile_m * tiles_n + tile_n, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for s in tl.static_range(SPLIT):
                total += tl.load(part + s * stride, mask=mask, other=0.0, cache_modifier=".cg")
            finish(
                total, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask
            )
            tl.store(count + tile_m * tiles_n + tile_n, 0)
    start_next(PDL)
