"""Packed rows -> rows of fp8 (MXFP4) or bf16 (NVFP4, and any scale), exact: operands of the library's matrix products.

In fp8 the group scales are folded into exponents relative to the row's largest byte. e5m2 holds 29 octaves of e2m1
values, e4m3 15 (SPEC §8): groups further below the row's maximum than that become zeros."""

import triton
import triton.language as tl

from ..common.decode import E4M3_TOP, E4M3_UNIT, E5M2_TOP, E5M2_UNIT, decode_bf16
from ..common.formats import e4m3_factor, e8m0_factor
from ..common.overlap import start_next, wait_inputs


@triton.jit
def _tables(e, E4: tl.constexpr):
    """Exponent fields -> (low, high): the fp8 bytes of the eight magnitudes. Subnormal down to where ½ is the last
    bit."""
    if E4:
        step = tl.maximum(e, 0) << 3
        low = step * 0x01010100 + 0x0C080000
        high = step * 0x01010101 + 0x1C181410
        low = tl.where(e == 0, 0x0C080400, low)
        low = tl.where(e == -1, 0x06040200, low)
        high = tl.where(e == -1, 0x14100C08, high)
        low = tl.where(e == -2, 0x03020100, low)
        high = tl.where(e == -2, 0x0C080604, high)
        smallest: tl.constexpr = -2
    else:
        step = tl.maximum(e, 0) << 2
        low = step * 0x01010100 + 0x06040000
        high = step * 0x01010101 + 0x0E0C0A08
        low = tl.where(e == 0, 0x06040200, low)
        low = tl.where(e == -1, 0x03020100, low)
        high = tl.where(e == -1, 0x0A080604, high)
        smallest: tl.constexpr = -1
    return tl.where(e < smallest, 0, low), tl.where(e < smallest, 0, high)


@triton.jit
def _look_up(w, low, high):
    """8 codes -> the fp8 bytes of codes 0..3 and of codes 4..7."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 m, h, a, t;
        mov.b32 t, 0x80808080;
        and.b32 m, $2, 0x77777777;
        shr.u32 h, m, 16;
        prmt.b32 m, $3, $4, m;
        prmt.b32 h, $3, $4, h;
        prmt.b32 a, t, t, $2;
        shl.b32 a, a, 7;
        lop3.b32 $0, a, t, m, 0xEA;
        shr.u32 a, $2, 16;
        prmt.b32 a, t, t, a;
        shl.b32 a, a, 7;
        lop3.b32 $1, a, t, h, 0xEA; }""",
        "=r,=r,r,r,r",
        [w, low, high],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _store_lanes(out, first_group, first, second, K: tl.constexpr, C: tl.constexpr):
    """Halves of C groups, [C, 4] words each, to a row: of every 4 groups the first words come first."""
    panel = first_group // 4 + tl.arange(0, C // 4)
    at = out + ((panel * 32)[:, None] + tl.arange(0, 16)[None, :])
    there = (panel < K // 128)[:, None]
    # Permuted first, so that 16 bytes are stored at once.
    first = tl.reshape(tl.permute(tl.reshape(first, (C // 4, 4, 4)), (0, 2, 1)), (C // 4, 16))
    second = tl.reshape(tl.permute(tl.reshape(second, (C // 4, 4, 4)), (0, 2, 1)), (C // 4, 16))
    tl.store(at, first, mask=there)
    tl.store(at + 16, second, mask=there)


@triton.jit
def _expand_fp8(
    r,
    part,
    parts,
    codes,
    scales,
    g,
    unit,
    out,
    K: tl.constexpr,
    KG: tl.constexpr,
    E4: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
):
    """The row r of `expand_fp8_kernel`, of its steps every `parts`-th from `part` on."""
    row = r.to(tl.int64)
    scales += row * (K // 32)
    codes += row * (K // 8)
    out += row * (K // 4)
    every = tl.arange(0, KG)
    # Down to a scalar, which has no layout: Triton 3.6 reduces a row of a tile again in the layout of the steps below, where the
    # lanes of a row are not neighbours, and exchanges values with the wrong ones (seen with 256 and 512 channels).
    top = tl.max(tl.load(scales + every, mask=every < K // 32, other=0).to(tl.int32), axis=0)
    factor = e8m0_factor(top) * (E4M3_UNIT if E4 else E5M2_UNIT)
    if SCALED:
        factor = factor * tl.div_rn(1.0, tl.load(g))
    tl.store(unit + r, factor)
    word = tl.arange(0, 4)[None, :]
    for i in tl.range(part, tl.cdiv(K // 32, C), parts):
        group = i * C + tl.arange(0, C)
        inside = group < K // 32
        b = tl.load(scales + group, mask=inside, other=0).to(tl.int32)
        low, high = _tables(b - top + (E4M3_TOP if E4 else E5M2_TOP), E4)
        inside = inside[:, None]
        w = tl.load(codes + ((group * 4)[:, None] + word), mask=inside, other=0)  # [C, 4]
        first, second = _look_up(w, tl.broadcast_to(low[:, None], (C, 4)), tl.broadcast_to(high[:, None], (C, 4)))
        if LANES:
            _store_lanes(out, i * C, first, second, K, C)
        else:
            at = out + ((group // 4 * 32 + group % 4 * 4)[:, None] + word)
            half = tl.where(group >= K // 128 * 4, K % 128 // 32 * 4, 16)  # words of a half
            tl.store(at, first, mask=inside)
            tl.store(at + half[:, None], second, mask=inside)


@triton.jit
def expand_fp8_kernel(
    codes,
    scales,
    g,
    unit,
    out,
    K: tl.constexpr,
    KG: tl.constexpr,
    E4: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes int32 [rows, K/8], scales uint8 [rows, K/32] -> out int32 (fp8 bytes) [rows, K/4] and unit fp32 [rows], by
    which a row's bytes are multiplied (1/g in it where SCALED). KG = K/32 rounded up to a power of two; C groups a
    step.

    Every 128 channels are stored as two halves, the channels 0..3 of every 8 and the channels 4..7: the order in which a
    look-up gives them. LANES, for the fused product (K % 128 = 0): in a half the first words of its four groups come first,
    then the second ones (`triton_gemm._to_lanes`). Both operands of a product have the same order, so that it cancels.
    Where K is not a multiple of 128, the halves are those of its last, shorter part. Grid (rows, programs for a row)."""
    wait_inputs(PDL)
    _expand_fp8(
        tl.program_id(0), tl.program_id(1), tl.num_programs(1), codes, scales, g, unit, out, K, KG, E4, SCALED, C, LANES
    )
    start_next(PDL)


@triton.jit(do_not_specialize=["M"])
def expand_both_kernel(
    x,
    xs,
    gx,
    x_unit,
    x_out,
    w,
    ws,
    gw,
    w_unit,
    w_out,
    M,
    K: tl.constexpr,
    KG: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Both operands of a product in one launch: x [M, K] to e5m2 and w [N, K] to e4m3, as `expand_fp8_kernel`; grid
    (M + N)."""
    wait_inputs(PDL)
    r = tl.program_id(0)
    if r < M:
        _expand_fp8(r, 0, 1, x, xs, gx, x_unit, x_out, K, KG, False, SCALED_X, C, False)
    else:
        _expand_fp8(r - M, 0, 1, w, ws, gw, w_unit, w_out, K, KG, True, SCALED_W, C, False)
    start_next(PDL)


@triton.jit
def expand_bf16_kernel(
    codes,
    scales,
    g,
    out,
    rows,
    K: tl.constexpr,
    MX: tl.constexpr,
    SCALED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PANELS: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes uint8 [rows, K/2], scales uint8 [rows, K/G] -> out bf16 [rows, K], exact without g, and with one that is a
    power of two; grid (rows/R, K/(2*C)). SCALED: divided by g. PANELS:
    of every 128 channels the even ones come first, then the odd ones, either in the order of `triton_gemm._to_lanes`
    (K % 128 = 0)."""
    G: tl.constexpr = 32 if MX else 16
    wait_inputs(PDL)
    r = tl.program_id(0) * R + tl.arange(0, R)
    inside = (r < rows)[:, None]
    row = tl.minimum(r, rows - 1).to(tl.int64)[:, None]
    c = tl.program_id(1) * C + tl.arange(0, C)
    group = tl.program_id(1) * (2 * C // G) + tl.arange(0, 2 * C // G)
    w = tl.load(codes + row * (K // 2) + c[None, :], mask=(c < K // 2)[None, :], other=0)
    byte = tl.load(scales + row * (K // G) + group[None, :], mask=(group < K // G)[None, :], other=1).to(tl.int32)
    factor = e8m0_factor(byte) if MX else e4m3_factor(byte)
    if SCALED:
        factor = factor * tl.div_rn(1.0, tl.load(g))
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (R, 2 * C // G, G // 2)), (R, C))
    low, high = decode_bf16(w)
    # The bit pattern is the value times 2^-126; the two halves of 2^126 keep every factor in fp32's range.
    low = low.to(tl.float32) * 9.223372036854775808e18 * 9.223372036854775808e18 * factor
    high = high.to(tl.float32) * 9.223372036854775808e18 * 9.223372036854775808e18 * factor
    if PANELS:
        # Permuted before they are stored, so that neighbours are stored at once.
        low = tl.reshape(tl.permute(tl.reshape(low.to(tl.bfloat16), (R, C // 32, 4, 4, 2)), (0, 1, 3, 2, 4)), (R, C))
        high = tl.reshape(tl.permute(tl.reshape(high.to(tl.bfloat16), (R, C // 32, 4, 4, 2)), (0, 1, 3, 2, 4)), (R, C))
        at = out + row * K + (c // 64 * 128 + c % 64)[None, :]
        inside = inside & (c < K // 2)[None, :]
        tl.store(at, low, mask=inside)
        tl.store(at + 64, high, mask=inside)
    else:
        k = tl.program_id(1) * (2 * C) + tl.arange(0, 2 * C)
        both = tl.reshape(tl.join(low, high), (R, 2 * C))
        tl.store(out + row * K + k[None, :], both.to(tl.bfloat16), mask=inside & (k < K)[None, :])
    start_next(PDL)
