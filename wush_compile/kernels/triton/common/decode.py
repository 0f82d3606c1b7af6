"""Packed e2m1 codes to operands of the tensor core: fp8 or bf16 values, and the units that their scales leave.

In fp8 a group's power-of-two scale goes into the exponents of its values, relative to the row's largest scale. The
row's own unit is then one fp32 factor. docs/spec.md §8 gives the ranges."""

import triton
import triton.language as tl

# Exponent field of the value 0.5 in a group that has the row's largest scale byte. 6 = 1.5 * 2^2 still fits above it.
E5M2_TOP, E4M3_TOP = tl.constexpr(27), tl.constexpr(12)
# What a code of value 1 is worth in the row's unit at that exponent: 2^-13 and 2^-6.
E5M2_UNIT, E4M3_UNIT = tl.constexpr(2.0**-13), tl.constexpr(2.0**-6)


@triton.constexpr_function
def fp8_ptx(codes, exponent):
    """PTX that decodes 8 codes, the register `codes`, to e5m2: `$0` gets the channels 0..3, `$1` the channels 4..7.

    Registers hold tables of the eight magnitudes, raised by the group's exponent (`E5M2_TOP` is in the constants). One
    `prmt` looks up four codes. Where a code's sign bit is set, `prmt` gives the sign of the table's byte instead, which
    is 0. So one look-up finds the positive codes. A second one, with the signs inverted, finds the negative codes. Its
    table holds their bytes halved, so that the table's sign bits are 0 too; the result is doubled."""
    return f"""{{ .reg .b32 l, h, m, n, p, q, v;
        mad.lo.u32 l, {exponent}, 0x04040400, 0x72706C00;
        mad.lo.u32 h, {exponent}, 0x04040404, 0x7A787674;
        mad.lo.u32 m, {exponent}, 0x02020200, 0x79787640;
        mad.lo.u32 n, {exponent}, 0x02020202, 0x7D7C7B7A;
        xor.b32 v, {codes}, 0x88888888;
        prmt.b32 p, l, h, {codes};
        prmt.b32 q, m, n, v;
        mad.lo.u32 $0, q, 2, p;
        shr.u32 p, {codes}, 16;
        shr.u32 q, v, 16;
        prmt.b32 p, l, h, p;
        prmt.b32 q, m, n, q;
        mad.lo.u32 $1, q, 2, p; }}"""


@triton.jit
def decode_fp8(w, e):
    """Packed codes uint8 and the groups' exponents relative to the row's largest, int32 -> e5m2 bytes of the channels
    0..3 of every 8, and of the channels 4..7.

    Needs four consecutive bytes of a row in one register, as the operand layout of 8-bit products has them."""
    a, b = tl.inline_asm_elementwise(
        fp8_ptx("$2", "$3"), "=&r,=&r,r,r,r,r,r", [w, e], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
    )
    return a.to(tl.float8e5, bitcast=True), b.to(tl.float8e5, bitcast=True)


# $0 and $1 get the low codes of the four bytes in $4 as bf16, $2 and $3 the high codes. The text has one line, because
# Inductor copies such constants into the source of a package's kernels.
BF16_PTX = tl.constexpr(
    "{ .reg .b32 p, q, t; prmt.b32 p, $4, 0, 0x4140; prmt.b32 q, $4, 0, 0x4342; "
    "and.b32 t, p, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 $0, t, 0x81C081C0; "
    "and.b32 t, q, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 $1, t, 0x81C081C0; "
    "and.b32 t, p, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 $2, t, 0x81C081C0; "
    "and.b32 t, q, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 $3, t, 0x81C081C0; }"
)


# $0 and $1 get the four int8 codes in $2 as bf16, in order. Behind the exponent of 2^7 the low seven bits of a byte are
# 128 more than their value; a byte with the sign bit stands for 128 less, behind one without for 0 less: 256 or 128 are
# subtracted, which is exact.
INT8_PTX = tl.constexpr(
    "{ .reg .b32 p, a, b, one; mov.b32 one, 0x3F803F80; "
    "prmt.b32 p, $2, 0, 0x4140; lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA; "
    "lop3.b32 b, p, 0x00800080, 0xC300C300, 0xEA; fma.rn.bf16x2 $0, a, one, b; "
    "prmt.b32 p, $2, 0, 0x4342; lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA; "
    "lop3.b32 b, p, 0x00800080, 0xC300C300, 0xEA; fma.rn.bf16x2 $1, a, one, b; }"
)


@triton.jit
def decode_bf16(w):
    """uint8, two codes each -> the bf16 values of the low and of the high codes, times 2^-126. Works in any layout."""
    return tl.inline_asm_elementwise(
        BF16_PTX, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )


@triton.jit
def e4m3_factor_bf16(words, selector):
    """The e4m3 byte of an int32 that a `prmt` selector of two equal bytes names -> bf16, times 2^119; 0x7F -> NaN.

    The byte shifted into bf16's fields is its value times 2^-120; 0x7F gets all exponent bits as well. The two
    neighbours in a register have the same byte."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 b, n, z, f, g;
        mov.b32 z, 0x80008000;
        mov.b32 f, 0x7B807B80;
        mov.b32 g, 0x7B007B00;
        prmt.b32 b, $1, 0, $3;
        add.u32 n, b, 0x00010001;
        and.b32 n, n, 0x00800080;
        shl.b32 b, b, 4;
        mad.lo.u32 b, n, 0xF0, b;
        fma.rn.bf16x2 b, b, f, z;
        fma.rn.bf16x2 $0, b, g, z; }""",
        "=r,r,r,r,r",
        [words, selector],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def e8m0_factor_bf16(words, selector, top):
    """The e8m0 byte of an int32 that a `prmt` selector names, relative to the byte `top` -> bf16, 2^(byte - top + 126);
    2^-126 where that would be less.

    The two neighbours in a register have the same byte."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 b;
        prmt.b32 b, $1, 0, $3;
        sub.s32 b, b, $5;
        add.s32 b, b, 253;
        max.s32 b, b, 1;
        mul.lo.u32 $0, b, 0x00800080; }""",
        "=r,r,r,r,r,r,r",
        [words, selector, top],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )
