"""MXFP4 and NVFP4 inside a Triton kernel: scale rules, rounding, packing, decoding; `formats.py`, bit for bit.

Nothing here uses a tensor cast to or from fp8: ptxas 12.8 and 12.9 read an undefined register when one thread converts
several fp32 values to e4m3 and back on sm_90. Scales are rounded and decoded in integer and fp32 arithmetic, which is
also what lets these functions run on any GPU and under Triton's interpreter.

Kernels that call these are compiled with `enable_fp_fusion=False`: `mse` is defined without fused multiply-add.
"""

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
ABS_BITS = tl.constexpr(0x7FFFFFFF)
MX_LIMIT = tl.constexpr(0x71800000)  # bits of 2^100: sums of rounding at larger values could overflow
MX_NAN = tl.constexpr(0xFF)
NV_NAN = tl.constexpr(0x7F)


@triton.jit
def float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def bits_float(x):
    return x.to(tl.float32, bitcast=True)


@triton.jit
def exp2(n):
    """2**n as fp32, exact, for int32 n in [-127, 127]; 2**-127 is subnormal."""
    return bits_float(tl.where(n > -127, (n + 127) << 23, 0x400000))


@triton.jit
def _step_sum(a):
    """(c, a + c) for a in [0, 8]: c = 2^(e + 22), e = the exponent of max(a, 1), so that the sum is rounded, half to
    even, to a multiple of 2^(e - 1), which is e2m1's spacing there."""
    c = bits_float((float_bits(tl.maximum(a, 1.0)) & INF_BITS) + (22 << 23))
    return c, a + c


@triton.jit
def e2m1_code(v):
    """fp32 -> code `s e e m` as int32: nearest, ties to the even code, saturating at 6, -0 keeps its sign."""
    _, total = _step_sum(tl.minimum(tl.abs(v), 6.0))
    bits = float_bits(total)  # (149 + e) << 23 | the number of steps, 0..4
    return ((bits & 7) + (bits >> 22) - 298) | ((float_bits(v) >> 28) & 8)


@triton.jit
def e4m3_encode(x):
    """fp32 in [0, 448] -> e4m3 byte as int32, half to even."""
    exponent = tl.maximum((float_bits(x) >> 23) - 127, -6)
    return float_bits(x * exp2(3 - exponent) + 8388608.0) - 0x4B000000 + ((exponent + 6) << 3)


@triton.jit
def e4m3_decode(byte):
    """e4m3 byte as int32, not NaN -> fp32: shifted into fp32's fields it is the value times 2^-120, subnormals too."""
    return bits_float(byte << 20) * 1.329227995784916e36


@triton.jit
def e4m3_factor(byte):
    """e4m3 byte as int32 -> fp32, 0x7F -> NaN."""
    return tl.where(byte == NV_NAN, float("nan"), e4m3_decode(byte))


@triton.jit
def e8m0_factor(byte):
    """e8m0 byte as int32, not 0 -> fp32 2^(byte - 127), 255 -> NaN."""
    return tl.where(byte == MX_NAN, float("nan"), bits_float(byte << 23))


@triton.jit
def _pairs(x, R: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr):
    """[R, N, 2*HALF] -> [R, N, HALF], element 2i plus 2i + 1: a sum of two has no order, whatever the layout."""
    return tl.sum(tl.reshape(x, (R, N, HALF, 2)), axis=3)


@triton.jit
def tree_sum(x, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """[R, N, G] -> [R, N], in the order of `formats._tree_sum`."""
    if G == 32:
        x = _pairs(x, R, N, 16)
    x = _pairs(x, R, N, 8)
    x = _pairs(x, R, N, 4)
    x = _pairs(x, R, N, 2)
    return tl.sum(x, axis=2)


# A term of `formats._squared_error`: ((v - e2m1(v)) * unit)^2 of v = $1 * $2, unit $3; p is the signed power of two of
# max(|v|, 1), and adding p * 2^22 rounds to e2m1's spacing there.
_ERROR_PTX = tl.constexpr(
    "{ .reg .f32 v, p, t; .reg .b32 b; mul.rn.f32 v, $1, $2; max.xorsign.abs.f32 p, v, 0f3F800000; mov.b32 b, p; "
    "and.b32 b, b, 0xFF800000; mov.b32 p, b; fma.rn.f32 t, p, 0f4A800000, v; fma.rn.f32 t, p, 0fCA800000, t; "
    "min.xorsign.abs.f32 t, t, 0f40C00000; sub.rn.f32 v, v, t; mul.rn.f32 v, v, $3; mul.rn.f32 $0, v, v; }"
)


@triton.jit
def squared_error(y, inverse, unit, PTX: tl.constexpr, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """`formats._squared_error` of [R, N, G] with factors [R, N]."""
    factor = tl.broadcast_to(inverse[:, :, None], (R, N, G))
    weight = tl.broadcast_to(unit[:, :, None], (R, N, G))
    if PTX > 1:
        terms = tl.inline_asm_elementwise(
            _ERROR_PTX, "=f,f,f,f", [y, factor, weight], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        a = tl.abs(y * factor)
        c, total = _step_sum(tl.minimum(a, 8.0))
        d = (a - tl.minimum(total - c, 6.0)) * weight
        # Not d * d: where a compiler may contract, it would take the product and the first sum for one operation.
        terms = tl.fma(d, d, 0.0)
    return tree_sum(terms, R, N, G)


# The terms of `formats._halved_scale_gain`. Clamping to [0, 1] costs nothing: it modifies additions and products.
_GAIN_PTX = tl.constexpr(
    "{ .reg .f32 a, u, g, p; abs.f32 a, $1; fma.rn.f32 u, a, $2, 0fBF000000; abs.f32 u, u; "
    "add.rn.f32 u, u, 0fBE800000; abs.f32 u, u; sub.rn.sat.f32 g, 0f3E000000, u; "
    "fma.rn.sat.f32 p, a, $2, 0fC0600000; fma.rn.f32 $0, p, 0fC0800000, g; }"
)


@triton.jit
def halved_scale_gain(y, inverse, PTX: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """`formats._halved_scale_gain` of [R, N, 32] with factors [R, N]."""
    factor = tl.broadcast_to(inverse[:, :, None], (R, N, 32))
    if PTX:
        terms = tl.inline_asm_elementwise(_GAIN_PTX, "=f,f,f", [y, factor], dtype=tl.float32, is_pure=True, pack=1)
    else:
        v = tl.abs(y * factor)
        gain = tl.maximum(0.125 - tl.abs(tl.abs(v - 0.5) - 0.25), 0.0)
        terms = gain - tl.minimum(tl.maximum(v - 3.5, 0.0), 1.0) * 4.0
    return tree_sum(terms, R, N, 32)


@triton.jit
def mx_scale(y, amax, RULE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr = False):
    """e8m0 bytes (int32 [R, N]) of groups y [R, N, 32]; amax: bits of the absolute maximum, finite."""
    if RULE == "paper":
        byte = amax >> 23
    elif RULE == "ocp":
        byte = (amax >> 23) - 2
    else:
        byte = ((amax + 0x3FFFFF) >> 23) - 2  # carries into the exponent from mantissas above 1.5
    byte = tl.maximum(byte, 1)  # at most 254: amax is finite
    if RULE == "mse":
        gain = halved_scale_gain(y, exp2(127 - byte), PTX, R, N)
        byte = tl.where(gain > 0, tl.maximum(byte - 1, 1), byte)
    return byte


@triton.jit
def _nv_byte(amax, g, LARGEST: tl.constexpr):
    byte = e4m3_encode(tl.minimum(bits_float(amax) * tl.div_rn(g, LARGEST), 448.0))
    return tl.minimum(tl.maximum(byte, 0x01), 0x7E)


@triton.jit
def nv_scale(y, amax, g, RULE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, PTX: tl.constexpr = 0):
    """e4m3 bytes (int32 [R, N]) of groups y [R, N, 16]; g: the global scale, fp32. PTX, as `pack_codes`, is for values
    of at most 2^100 times their scale."""
    byte = _nv_byte(amax, g, 6.0)
    if RULE == "mse":
        narrow = _nv_byte(amax, g, 4.0)
        s0 = e4m3_decode(byte)
        s1 = e4m3_decode(narrow)
        e0 = squared_error(y, tl.div_rn(g, s0), s0, PTX, R, N, 16)
        e1 = squared_error(y, tl.div_rn(g, s1), s1, PTX, R, N, 16)
        byte = tl.where(e1 < e0, narrow, byte)
    return byte


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_max_magnitude(a, b):
    """The larger magnitude with some sign: taking absolute values would be an instruction more."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def group_amax(y, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr, PTX: tl.constexpr = 0):
    """Bits of the absolute maximum of every group of y [R, W]: int32 [R, W/G]; as integers NaN > Inf > any number."""
    if PTX > 1:
        return float_bits(tl.reduce(tl.reshape(y, (R, W // G, G)), 2, _nan_max_magnitude)) & ABS_BITS
    return float_bits(tl.reduce(tl.reshape(tl.abs(y), (R, W // G, G)), 2, _nan_max))


@triton.constexpr_function
def _pack_ptx(values, byte, ptx, native, most):
    """PTX that leaves the codes of 8 floats, the registers `values`, in register `word`, the first in its low nibble.

    byte: the register with the e8m0 byte of their group, if they are not yet multiplied by its inverse, or "".
    ptx: 2 for sm_86 and later, 1 before. most: what no magnitude exceeds, 6 or 10, or 0 if any may occur.

    Without Blackwell's instruction a magnitude a is rounded by adding c = p * 2^22, p the power of two of max(a, 1), as
    `_step_sum`; c has 214 of p's half steps more, which makes the low byte of sum + (sum >> 22) the code. Of two sums,
    one 16 times, the integer sum is taken first: their fields do not meet. In a group's own units p is the power of two
    of max(a, 2^(byte - 127)), and c has so many half steps more or less that the exponent's share is the same."""
    if native:
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
            if ptx > 1:  # the larger magnitude with the first one's sign, at once
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
    if most == 10:  # above 7 the code is 8 so far, and must be 7
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
def _bytes_ptx(ptx, native):
    """For `pack_codes`: operands 1..4 are the low nibbles of four bytes, 5..8 the high ones."""
    return (
        "{ .reg .b32 word; "
        + _pack_ptx([f"${i // 2 + 4 * (i % 2) + 1}" for i in range(8)], "", ptx, native, 0)
        + " mov.b32 $0, word; }"
    )


@triton.constexpr_function
def _store_ptx(words, by_group, masked, ptx, native, most):
    """For `store_codes`: an output without meaning, 8 values for each word, the byte, the pointer, the mask."""
    after = 8 * words + 1
    byte, pointer, mask = (f"${after}" if by_group else ""), f"${after + by_group}", f"${after + by_group + 1}"
    text = f"{{ .reg .b32 word; .reg .b32 w<{words}>; .reg .pred q; mov.b32 $0, 0; "
    for j in range(words):
        values = [f"${8 * j + i + 1}" for i in range(8)]
        text += _pack_ptx(values, byte, ptx, native, most) + f" mov.b32 w{j}, word; "
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
def pack_codes(v, PTX: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """fp32 [R, W] -> two codes a byte, uint8 [R, W/2]. PTX: by assembly, 2 for sm_86 and later,
    1 before, 0 in the interpreter; NATIVE: Blackwell's."""
    low, high = tl.split(tl.reshape(v, (R, W // 2, 2)))
    if PTX:
        return tl.inline_asm_elementwise(
            _bytes_ptx(PTX, NATIVE), "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4
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
    """[R, 8*WORDS*N] -> 8*WORDS tensors [R, N]: of so many neighbours the first, the second, ..."""
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
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WORDS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Codes of y fp32 [R, W] to `pointer` [R, W/(8*WORDS)], 4*WORDS bytes each, where `inside` (None: everywhere), by
    assembly: a store of Triton's would first move them between threads.

    BY_GROUP: of y * 2^(127 - byte), for |y| with bits below MX_LIMIT; byte [R, W/32]. MOST: as `_pack_ptx`."""
    MASKED: tl.constexpr = inside is not None
    N: tl.constexpr = W // (8 * WORDS)
    operands = _neighbours(y, WORDS, R, N)
    if BY_GROUP:
        # Spread over the group's channels first: so the bytes lie with the threads that hold the channels.
        spread = tl.reshape(tl.broadcast_to(byte[:, :, None], (R, W // 32, 32)), (R, W))
        operands += (_neighbours(spread, WORDS, R, N)[0],)
    operands += (pointer.to(tl.int64, bitcast=True),)
    if MASKED:
        operands += (inside.to(tl.int32),)
    tl.inline_asm_elementwise(
        _store_ptx(WORDS, BY_GROUP, MASKED, PTX, NATIVE, MOST),
        _store_constraints(WORDS, BY_GROUP, MASKED),
        operands,
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_bytes(pointer, inside, byte):
    """int32 `byte` to uint8 `pointer` where `inside` (None: everywhere), by assembly, by whichever threads hold it."""
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


@triton.jit
def drop_bad(y, amax, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """y [R, W] with zeros for the groups whose `group_amax` is not finite: their codes are 0."""
    bad = tl.reshape(tl.broadcast_to((amax >= INF_BITS)[:, :, None], (R, W // G, G)), (R, W))
    return tl.where(bad, 0.0, y)


@triton.jit
def group_scales(
    y,
    amax,
    g,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """y fp32 [R, W], bits of its groups' absolute maxima, finite -> (scale bytes int32, factors fp32), [R, W/G]."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    N: tl.constexpr = W // G
    groups = tl.reshape(y, (R, N, G))
    if FORMAT == "mxfp4":
        byte = mx_scale(groups, amax, RULE, R, N, PTX)
        factor = exp2(127 - byte)
        if SCALED:
            factor = factor * g
    else:
        byte = nv_scale(groups, amax, g, RULE, R, N, PTX)
        factor = tl.div_rn(g, e4m3_decode(byte))
    return byte, factor


@triton.jit
def times_factor(y, factor, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """y [R, W] times its groups' factors [R, W/G]."""
    return tl.reshape(tl.reshape(y, (R, W // G, G)) * factor[:, :, None], (R, W))
