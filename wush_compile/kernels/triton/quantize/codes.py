"""Packing of codes, two a byte, and stores past Triton's own, by assembly."""

import triton
import triton.language as tl

from ..common.formats import e2m1_code


@triton.constexpr_function
def _pack_ptx(values, byte, sm, most):
    """PTX that leaves the codes of 8 floats, the registers `values`, in register `word`, the first in its low nibble.

    byte: the register with the e8m0 byte of the group, if the values are not yet multiplied by its inverse; else "".
    sm: as `Spec.sm`. most: a bound of the magnitudes, 6 or 10; 0: no bound.

    Without Blackwell's instruction, adding c = p * 2^22 rounds a magnitude a, as in `_step_sum`; p is the power of two
    of max(a, 1). c has 214 more of p's half steps, so that the low byte of sum + (sum >> 22) is the code. Two sums
    share one word: 16 times the second is added to the first as integers, and their fields do not overlap. In a
    group's own units p is the power of two of max(a, 2^(byte - 127)); c has more or fewer half steps, so that the
    share of the exponent in the code is the same."""
    if sm >= 100:
        lines = ["{ .reg .b8 t0, t1, t2, t3; .reg .b32 i; .reg .f32 f; .reg .f32 v<8>;"]
        if byte:
            lines.append(f"shl.b32 i, {byte}, 23; sub.u32 i, 0x7F000000, i; mov.b32 f, i;")
        lines += [f"mul.rn.f32 v{i}, {v}, f;" if byte else f"mov.f32 v{i}, {v};" for i, v in enumerate(values)]
        lines += [f"cvt.rn.satfinite.e2m1x2.f32 t{j}, v{2 * j + 1}, v{2 * j};" for j in range(4)]
        return " ".join(lines) + " mov.b32 word, {t0, t1, t2, t3}; }"
    lines = ["{ .reg .f32 a, p, c, one, six; .reg .b32 i, l, h; .reg .b32 s<4>;"]
    if byte:
        lines.append(
            f"shl.b32 i, {byte}, 23; mov.b32 one, i; add.u32 i, i, 0x01400000; mov.b32 six, i; "
            f"shl.b32 i, {byte}, 1; sub.u32 i, {0x4A800000 + 214 + 254}, i; mov.b32 c, i;"
        )
    else:
        lines.append("mov.f32 one, 0f3F800000; mov.f32 six, 0f40C00000; mov.f32 c, 0f4A8000D6;")
    for j in range(4):
        for target, value in (("l", values[2 * j]), ("h", values[2 * j + 1])):
            if sm >= 86:  # the larger magnitude with the first one's sign, at once
                lines.append(
                    (f"min.xorsign.abs.f32 a, {value}, six; " if most == 0 else f"mov.f32 a, {value}; ")
                    + "max.xorsign.abs.f32 p, a, one; "
                    "mov.b32 i, p; and.b32 i, i, 0xFF800000; mov.b32 p, i;"
                )
            else:
                clip = "min.f32 a, a, six; " if most == 0 else ""
                lines.append(
                    f"abs.f32 a, {value}; {clip}max.f32 p, a, one; "
                    f"mov.b32 i, p; and.b32 i, i, 0x7F800000; mov.b32 p, i;"
                )
            lines.append(f"fma.rn.f32 a, p, c, a; mov.b32 {target}, a;")
        lines.append(f"mad.lo.u32 s{j}, h, 16, l; shr.u32 h, s{j}, 22; add.u32 s{j}, s{j}, h;")
    lines.append("prmt.b32 s0, s0, s1, 0x40; prmt.b32 s2, s2, s3, 0x40; prmt.b32 s0, s0, s2, 0x5410;")
    if most == 10:  # above 7 the code is 8 so far, but must be 7
        lines.append("and.b32 l, s0, 0x88888888; shr.u32 l, l, 3; sub.u32 s0, s0, l;")
    return " ".join(lines) + " mov.b32 word, s0; } " + _signs_ptx(values)


@triton.constexpr_function
def _signs_ptx(values):
    """PTX that adds the signs of 8 floats to the codes of their magnitudes in register `word`."""
    lines = ["{ .reg .b32 t<8>;"]
    lines += [f"mov.b32 t{i}, {v};" for i, v in enumerate(values)]
    for i in (0, 1):  # of the even values, and of the odd ones
        lines.append(
            f"prmt.b32 t{i}, t{i}, t{i + 2}, 0x73; prmt.b32 t{i + 4}, t{i + 4}, t{i + 6}, 0x73; "
            f"prmt.b32 t{i}, t{i}, t{i + 4}, 0x5410;"
        )
    return " ".join(lines) + (
        " shr.u32 t0, t0, 4; lop3.b32 word, t0, 0x08080808, word, 0xEA; lop3.b32 word, t1, 0x80808080, word, 0xEA; }"
    )


@triton.constexpr_function
def _bytes_ptx(sm):
    """For `pack_codes`: operands 1..4 are the low nibbles of four bytes, 5..8 the high ones."""
    return (
        "{ .reg .b32 word; "
        + _pack_ptx([f"${i // 2 + 4 * (i % 2) + 1}" for i in range(8)], "", sm, 0)
        + " mov.b32 $0, word; }"
    )


@triton.constexpr_function
def _store_ptx(words, by_group, masked, sm, most):
    """For `store_codes`: an output without meaning, 8 values for each word, the byte, the pointer, the mask."""
    after = 8 * words + 1
    byte, pointer, mask = (f"${after}" if by_group else ""), f"${after + by_group}", f"${after + by_group + 1}"
    text = f"{{ .reg .b32 word; .reg .b32 w<{words}>; .reg .pred q; mov.b32 $0, 0; "
    for j in range(words):
        values = [f"${8 * j + i + 1}" for i in range(8)]
        text += _pack_ptx(values, byte, sm, most) + f" mov.b32 w{j}, word; "
    text += f"setp.ne.b32 q, {mask}, 0; @q " if masked else ""
    return (
        text
        + {
            1: f"st.global.b32 [{pointer}], w0; }}",
            2: f"st.global.v2.b32 [{pointer}], {{w0, w1}}; }}",
            4: f"st.global.v4.b32 [{pointer}], {{w0, w1, w2, w3}}; }}",
        }[words]
    )


@triton.constexpr_function
def _store_constraints(words, by_group, masked):
    return ",".join(["=r"] + ["f"] * (8 * words) + ["r"] * by_group + ["l"] + ["r"] * masked)


@triton.jit
def pack_codes(v, SM: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """fp32 [R, W] -> two codes a byte, uint8 [R, W/2]. SM: as `Spec.sm`."""
    low, high = tl.split(tl.reshape(v, (R, W // 2, 2)))
    if SM > 0:
        return tl.inline_asm_elementwise(
            _bytes_ptx(SM), "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    return (e2m1_code(low) | (e2m1_code(high) << 4)).to(tl.uint8)


@triton.jit
def _eighths(y, R: tl.constexpr, N: tl.constexpr):
    """[R, N, 8] -> eight [R, N]."""
    even, odd = tl.split(tl.reshape(y, (R, N, 2, 2, 2)))
    y04, y26 = tl.split(even)
    y15, y37 = tl.split(odd)
    y0, y4 = tl.split(y04)
    y2, y6 = tl.split(y26)
    y1, y5 = tl.split(y15)
    y3, y7 = tl.split(y37)
    return y0, y1, y2, y3, y4, y5, y6, y7


@triton.jit
def _neighbours(y, WORDS: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """[R, 8*WORDS*N] -> 8*WORDS tensors [R, N]: the first of each 8*WORDS neighbours, the second, and so on."""
    if WORDS == 1:
        parts = _eighths(tl.reshape(y, (R, N, 8)), R, N)
    elif WORDS == 2:
        a, b = tl.split(tl.permute(tl.reshape(y, (R, N, 2, 8)), (0, 1, 3, 2)))
        parts = _eighths(a, R, N) + _eighths(b, R, N)
    else:
        ab, cd = tl.split(tl.permute(tl.reshape(y, (R, N, 2, 2, 8)), (0, 1, 3, 4, 2)))  # [R, N, 2, 8] each
        a, b = tl.split(tl.permute(ab, (0, 1, 3, 2)))
        c, d = tl.split(tl.permute(cd, (0, 1, 3, 2)))
        parts = _eighths(a, R, N) + _eighths(b, R, N) + _eighths(c, R, N) + _eighths(d, R, N)
    return parts


@triton.jit
def store_codes(
    pointer,
    inside,
    y,
    byte,
    BY_GROUP: tl.constexpr,
    MOST: tl.constexpr,
    SM: tl.constexpr,
    WORDS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Stores the codes of y fp32 [R, W] to `pointer` [R, W/(8*WORDS)], 4*WORDS bytes each, where `inside` (None:
    everywhere). By assembly, because Triton's own store would first move the codes between threads.

    BY_GROUP: the codes of y * 2^(127 - byte), for |y| with bits below MX_LIMIT; byte [R, W/32]. MOST: as
    `_pack_ptx`."""
    MASKED: tl.constexpr = inside is not None
    N: tl.constexpr = W // (8 * WORDS)
    operands = _neighbours(y, WORDS, R, N)
    if BY_GROUP:
        # Spread over the channels of the group first, so that the threads with the channels hold the bytes.
        spread = tl.reshape(tl.broadcast_to(byte[:, :, None], (R, W // 32, 32)), (R, W))
        operands += (_neighbours(spread, WORDS, R, N)[0],)
    operands += (pointer.to(tl.int64, bitcast=True),)
    if MASKED:
        operands += (inside.to(tl.int32),)
    tl.inline_asm_elementwise(
        _store_ptx(WORDS, BY_GROUP, MASKED, SM, MOST),
        _store_constraints(WORDS, BY_GROUP, MASKED),
        operands,
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_bytes(pointer, inside, byte):
    """int32 `byte` to uint8 `pointer` where `inside` (None: everywhere), by assembly: each thread stores the bytes
    that it holds."""
    address = pointer.to(tl.int64, bitcast=True)
    if inside is None:
        tl.inline_asm_elementwise(
            "st.global.b8 [$1], $2; mov.b32 $0, 0;", "=r,l,r", [address, byte], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred q; setp.ne.b32 q, $3, 0; @q st.global.b8 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [address, byte, inside.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
