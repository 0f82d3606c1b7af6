"""NVFP4's rule `mse` for threads that hold whole groups: both scales' errors and the codes, in one piece of assembly.

`formats._squared_error` rounds every term and adds in a fixed order. Here the sums of squares are fused, and in units of
their scale: 7 instructions a value and scale instead of 10. Such a sum is within 17 roundings of the defined one. So the
comparison is certain where the sums differ by more than 20/2^24 of their total. A group that is closer is left to the
program's second pass, which computes as defined: about one in 2^17, and groups without any error. The rounded values
of both scales are kept, and the better ones become codes.
"""

import triton
import triton.language as tl

from ..common.formats import INF_BITS, bits_float, e4m3_decode, nv_byte
from .codes import neighbours, store_words, sums_ptx
from .load import inside_mask

GROUP = tl.constexpr(16)


@triton.constexpr_function
def _errors_ptx(scale, kept):
    """PTX: the sum of (v - e2m1(v))^2 over v = $3 .. $18 times operand `scale`, |v| < 7, to e0 + e1; what rounds v, as
    in `codes._pack_ptx`, to registers `kept`."""
    lines = []
    for i in range(16):
        lines.append(
            f"mul.rn.f32 v, ${i + 3}, {scale}; max.xorsign.abs.f32 p, v, 0f3F800000; mov.b32 i, p; "
            "and.b32 i, i, 0xFF800000; mov.b32 p, i; fma.rn.f32 t, p, 0f4A8000D6, v; "
            f"mov.b32 {kept}{i}, t; fma.rn.f32 t, p, 0fCA8000D6, t; sub.rn.f32 t, v, t; "
        )
        lines.append(f"mul.rn.f32 e{i}, t, t; " if i < 2 else f"fma.rn.f32 e{i % 2}, t, t, e{i % 2}; ")
    return "".join(lines)


@triton.constexpr_function
def _ptx():
    """Operands: $3 .. $18 the group, $19 and $20 what multiplies it, $21 and $22 the scales.

    $0: 0 if the first scale is better, 1 if the second is, 2 if it is not certain. $1, $2: codes by that scale."""
    text = (
        "{ .reg .f32 v, p, t, e<2>, wide, narrow; .reg .b32 i, word; .reg .b32 a<16>; .reg .b32 b<16>; "
        ".reg .pred less, near, other; "
    )
    for scale, unit, kept, total in (("$19", "$21", "a", "wide"), ("$20", "$22", "b", "narrow")):
        text += _errors_ptx(scale, kept)
        text += f"add.rn.f32 e0, e0, e1; mul.rn.f32 p, {unit}, {unit}; mul.rn.f32 {total}, e0, p; "
    # Below 2^-100 the products above may have lost bits.
    text += (
        "setp.lt.f32 less, narrow, wide; sub.rn.f32 p, narrow, wide; abs.f32 p, p; add.rn.f32 t, narrow, wide; "
        "fma.rn.f32 t, t, 0f35A00000, 0f0D800000; setp.leu.f32 near, p, t; setp.ne.f32 other, $21, $22; "
        "and.pred near, near, other; selp.b32 $0, 1, 0, less; selp.b32 $0, 2, $0, near; "
    )
    text += "".join(f"selp.b32 a{i}, b{i}, a{i}, less; " for i in range(16))
    for j in range(2):
        text += sums_ptx([f"a{8 * j + i}" for i in range(8)], [f"${8 * j + i + 3}" for i in range(8)])
        text += f" mov.b32 ${j + 1}, word; "
    return text + "}"


@triton.jit
def _spread(value, R: tl.constexpr, W: tl.constexpr):
    """[R, W/16] -> the same in the threads that hold the groups."""
    wide = tl.reshape(tl.broadcast_to(value[:, :, None], (R, W // GROUP, GROUP)), (R, W))
    return neighbours(wide, 2, R, W // GROUP)[0]


@triton.jit
def store_least_error(
    codes, y, amax, g, row, left, first, SPEC: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr
):
    """Stores the codes of one tile y fp32 [R, W], as `store.store_values`.

    amax: bits of the groups' absolute maxima; g: the global scale. Returns the scale bytes int32 [R, W/16], and `amax`
    with Inf where the choice is not certain."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    rows = row + tl.arange(0, R)[:, None]
    groups = tl.arange(0, W // GROUP)[None, :]
    inside = inside_mask(rows, left, first // GROUP + groups, SPEC.width // GROUP, MASKED, EVEN)
    pointer = codes + (rows * (SPEC.width // 2) + groups * 8)
    byte, narrow = nv_byte(amax, g, 6.0), nv_byte(amax, g, 4.0)
    s0, s1 = e4m3_decode(byte), e4m3_decode(narrow)
    f0, f1 = tl.div_rn(g, s0), tl.div_rn(g, s1)
    operands = neighbours(y, 2, R, W // GROUP)
    operands += (_spread(f0, R, W), _spread(f1, R, W), _spread(s0, R, W), _spread(s1, R, W))
    # Without side effects, because Triton computes this again where another layout needs the verdict.
    verdict, first_word, second_word = tl.inline_asm_elementwise(
        _ptx(),
        "=&r,=&r,=&r" + ",f" * 20,
        operands,
        dtype=(tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    store_words(pointer, inside, first_word, second_word)
    # Small e4m3 scales are rounded so far that values may exceed 7, where e2m1 is clipped.
    unsure = (verdict == 2) | ((bits_float(amax) * f0 > 6.9) & (byte != narrow))
    return tl.where(verdict == 1, narrow, byte), tl.where(unsure, INF_BITS, amax)
