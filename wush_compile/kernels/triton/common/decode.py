"""Packed e2m1 codes to operands of the tensor core: fp8 or bf16 values, and the units that their scales leave."""

import triton
import triton.language as tl

# A group's exponent field for its value ½, when its byte is the row's largest: 6 = 1.5·2^2 still fits.
E5M2_TOP, E4M3_TOP = tl.constexpr(27), tl.constexpr(12)
# 2^-13 and 2^-6: what a code of value 1 is worth in the row's own unit at that exponent.
E5M2_UNIT, E4M3_UNIT = tl.constexpr(2.0**-13), tl.constexpr(2.0**-6)


@triton.constexpr_function
def fp8_ptx(codes, exponent):
    """PTX that decodes 8 codes, the register `codes`, to e5m2: `$0` gets the channels 0..3, `$1` the channels 4..7.

    The tables of the eight magnitudes, raised by the group's exponent (`E5M2_TOP` is in the constants), sit in registers;
    `prmt` looks four codes up at once, and gives 0, the sign of the table's byte, where a code's own sign bit is set. So one
    look-up finds the positive codes, one the negative ones: half of their byte, so that it has no sign yet."""
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
    """Packed codes uint8, the groups' exponents relative to the row's largest int32 -> e5m2 bytes of the channels 0..3
    of every 8, and of 4..7.

    Right where four consecutive bytes of a row share a register, as in the operand layout of 8-bit products."""
    a, b = tl.inline_asm_elementwise(
        fp8_ptx("$2", "$3"), "=&r,=&r,r,r,r,r,r", [w, e], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
    )
    return a.to(tl.float8e5, bitcast=True), b.to(tl.float8e5, bitcast=True)


@triton.jit
def e4m3_factor_bf16(words, selector):
    """The e4m3 byte of an int32 that a selector of two equal bytes names -> bf16, times 2^119; 0x7F -> NaN.

    Shifted into bf16's fields the byte is its value times 2^-120; 0x7F gets all exponent bits besides. Two neighbours
    of a register have the same byte."""
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


# Two registers of bf16 for the low codes of the four bytes in $4, two for the high ones. On one line: Inductor writes such
# constants into the text of a package's kernels.
BF16_PTX = tl.constexpr(
    "{ .reg .b32 p, q, t; prmt.b32 p, $4, 0, 0x4140; prmt.b32 q, $4, 0, 0x4342; "
    "and.b32 t, p, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 $0, t, 0x81C081C0; "
    "and.b32 t, q, 0x000F000F; mul.lo.u32 t, t, 0x1040; and.b32 $1, t, 0x81C081C0; "
    "and.b32 t, p, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 $2, t, 0x81C081C0; "
    "and.b32 t, q, 0x00F000F0; mul.lo.u32 t, t, 0x104; and.b32 $3, t, 0x81C081C0; }"
)


@triton.jit
def decode_bf16(w):
    """uint8, two codes -> bf16 values of the low and of the high one, times 2^-126. Byte by byte: right in any
    layout."""
    return tl.inline_asm_elementwise(
        BF16_PTX, "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )
