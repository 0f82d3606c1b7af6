"""Packed weights decoded in registers, straight into tensor-core products: for batches where weights are the traffic.

Weights are the left operand (outᵀ = W xᵀ): the decoded tile goes from registers to the tensor core, and few activation
rows waste little. MXFP4 runs in fp8 e5m2 with the group scales folded into exponents relative to the row's largest byte
(SPEC §8); a group more than 26 octaves below it is taken for one 26 octaves below, an error under 2^-24 of the row's
maximum. NVFP4 runs in bf16, where every value times its scale is exact.

Splitting K over programs: each stores its fp32 part, the last one to arrive adds them up, always in the same order.
"""

import triton
import triton.language as tl

from .triton_expand import E5M2_TOP, E5M2_UNIT, decode_bf16
from .triton_formats import e4m3_factor, e8m0_factor
from .triton_gemv import finish


@triton.jit
def _decode_fp8(w, e, signs):
    """Packed codes uint8, the groups' exponent fields int32, `SIGNS` -> e5m2 bytes of the channels 0..3 of every 8,
    and of 4..7.

    Right where four consecutive bytes of a row share a register, as in the operand layout of 8-bit products. The table
    of the eight magnitudes, raised by the group's exponent, sits in two registers; `prmt` looks four codes up at once.
    Its own sign mode, on a table of 0x80, gives 0xFF for negative codes. """
    a, b = tl.inline_asm_elementwise(
        """{ .reg .b32 l, h, m, n, s;
        mad.lo.u32 l, $3, 0x04040400, 0x06040000;
        mad.lo.u32 h, $3, 0x04040404, 0x0E0C0A08;
        and.b32 m, $2, 0x77777777;
        shr.u32 n, m, 16;
        prmt.b32 m, l, h, m;
        prmt.b32 n, l, h, n;
        prmt.b32 s, $7, $7, $2;
        shl.b32 s, s, 7;
        lop3.b32 $0, s, 0x80808080, m, 0xEA;
        shr.u32 s, $2, 16;
        prmt.b32 s, $7, $7, s;
        shl.b32 s, s, 7;
        lop3.b32 $1, s, 0x80808080, n, 0xEA; }""",
        "=r,=r,r,r,r,r,r,r,r,r,r", [w, e, signs], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
    )
    return a.to(tl.float8e5, bitcast=True), b.to(tl.float8e5, bitcast=True)


@triton.jit
def _scale_bytes(scales, row, word, shifts, WORDS: tl.constexpr, R: tl.constexpr):
    """[R, 4*WORDS] scale bytes as int32, four a word. The shifts come from memory: the pass that moves the decoding
    into the operand's layout looks through arithmetic down to loads, and no further."""
    if WORDS == 1:
        v = tl.load(scales + row + word)
        return (v[:, None] >> tl.load(shifts + tl.arange(0, 4))[None, :]) & 0xFF
    else:
        v = tl.load(scales + row[:, None] + word + tl.arange(0, WORDS)[None, :])
        v = (v[:, :, None] >> tl.load(shifts + tl.arange(0, 4))[None, None, :]) & 0xFF
        return tl.reshape(v, (R, 4 * WORDS))


@triton.jit
def _decode(w, byte, top, signs, MX: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    """Packed tile [R, BK/2], its scale bytes [R, BK/G] -> two operand tiles [R, BK/2], the same channels for x and
    w."""
    G: tl.constexpr = 32 if MX else 16
    N: tl.constexpr = BK // G
    if MX:
        e = tl.maximum(byte - top[:, None] + E5M2_TOP, 1)
        return _decode_fp8(w, tl.reshape(tl.broadcast_to(e[:, :, None], (R, N, G // 2)), (R, BK // 2)), signs)
    else:
        # 2^119 of the pattern's 2^-126: the product is the value times 2^-7, with at most six significant bits.
        factor = (e4m3_factor(byte) * 6.646139978924579e35).to(tl.bfloat16)
        factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (R, N, G // 2)), (R, BK // 2))
        a, b = decode_bf16(w)
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


@triton.jit(do_not_specialize=["M"])
def fused_gemm_kernel(
    x, xs, x_unit, gx, w, ws, w_top, gw, bias, residual, shifts, out, parts, count, M, N: tl.constexpr, K: tl.constexpr,
    MX: tl.constexpr, PACKED: tl.constexpr, SCALED_X: tl.constexpr, SCALED_W: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr, GROUP: tl.constexpr,
):
    """out [M, N] from w uint8 [N, K/2], ws int32 [N, K/(4G)] (four scale bytes a word), w_top uint8 [N] (MXFP4: the
    largest byte of each row). x: uint8 [M, K/2] with xs int32 [M, K/(4G)] if PACKED, else e5m2 bytes [M, K] in panels
    (see `expand_fp8_kernel`) with x_unit fp32 [M]. parts fp32 [SPLIT, M, N], count int32, all zeros before and after.
    Grid (tiles of N times tiles of M, SPLIT)."""
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
    top_n = row_n
    top_m = row_m
    if MX:
        top_n = tl.load(w_top + row_n).to(tl.int32)
        if PACKED:
            top_m = _row_maximum(xs, row_m * ROW_WORDS, start // (4 * G), PART // (4 * G), BM)
    signs = tl.load(shifts + 4)
    half = tl.arange(0, HALF)
    panel = half // 64 * 128 + half % 64
    w_row = w + row_n.to(tl.int64)[:, None] * (K // 2)
    acc = tl.zeros((BN, BM), tl.float32)
    for i in tl.range(0, PART // BK, num_stages=STAGES):
        k = start + i * BK
        codes = tl.load(w_row + (k // 2 + half)[None, :])
        byte = _scale_bytes(ws, row_n * ROW_WORDS, k // (4 * G), shifts, WORDS, BN)
        if PACKED:
            x_codes = tl.load(x + row_m.to(tl.int64)[:, None] * (K // 2) + (k // 2 + half)[None, :])
            x_byte = _scale_bytes(xs, row_m * ROW_WORDS, k // (4 * G), shifts, WORDS, BM)
            x0, x1 = _decode(x_codes, x_byte, top_m, signs, MX, BM, BK)
            x0 = tl.trans(x0)
            x1 = tl.trans(x1)
        else:
            at = x + row_m.to(tl.int64)[None, :] * K + (k + panel)[:, None]
            x0 = tl.load(at).to(tl.float8e5, bitcast=True)
            x1 = tl.load(at + 64).to(tl.float8e5, bitcast=True)
        w0, w1 = _decode(codes, byte, top_n, signs, MX, BN, BK)
        acc = tl.dot(w0, x0, acc)
        acc = tl.dot(w1, x1, acc)
    if MX:
        acc = acc * (e8m0_factor(top_n) * E5M2_UNIT)[:, None]
        if PACKED:
            acc = acc * (e8m0_factor(top_m) * E5M2_UNIT)[None, :]
        else:
            acc = acc * tl.load(x_unit + row_m)[None, :]
    else:
        acc = acc * 16384.0                                   # the two patterns' 2^-7
    mask = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT == 1:
        finish(acc, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL, mask)
    else:
        part = parts + m.to(tl.int64)[None, :] * N + n[:, None]
        stride = M.to(tl.int64) * N
        tl.store(part + split * stride, acc, mask=mask, cache_modifier=".cg")
        tl.debug_barrier()
        arrived = tl.atomic_add(count + tile_m * tiles_n + tile_n, 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for s in tl.static_range(SPLIT):
                total += tl.load(part + s * stride, mask=mask, other=0.0, cache_modifier=".cg")
            finish(total, n[:, None], m[None, :], N, gx, gw, bias, residual, out, SCALED_X, SCALED_W, BIAS, RESIDUAL,
                   mask)
            tl.store(count + tile_m * tiles_n + tile_n, 0)
