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
    bits = float_bits(total)                      # (149 + e) << 23 | the number of steps, 0..4
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
    """[R, N, 2*HALF] -> [R, N, HALF], element 2i plus element 2i + 1. A sum of two has no order, whatever the layout."""
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


@triton.jit
def squared_error(y, inverse, unit, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """`formats._squared_error` of [R, N, G] with factors [R, N]."""
    a = tl.abs(y * inverse[:, :, None])
    c, total = _step_sum(tl.minimum(a, 8.0))
    d = (a - tl.minimum(total - c, 6.0)) * unit[:, :, None]
    return tree_sum(d * d, R, N, G)


# The terms of `formats._halved_scale_gain`. Clamping to [0, 1] costs nothing: it is a modifier of additions and products.
_GAIN_PTX = tl.constexpr(
    "{ .reg .f32 a, s, r, g, p; abs.f32 a, $1; mul.rn.sat.f32 s, a, $2; add.rn.f32 r, s, 0f4A800000; "
    "add.rn.f32 r, r, 0fCA800000; sub.rn.f32 r, s, r; abs.f32 r, r; add.rn.sat.f32 g, r, 0fBE000000; "
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
        small = tl.minimum(v, 1.0)
        gain = tl.maximum(tl.abs(small - ((small + 4194304.0) - 4194304.0)) - 0.125, 0.0)
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
        byte = ((amax + 0x3FFFFF) >> 23) - 2                # carries into the exponent from mantissas above 1.5
    byte = tl.maximum(byte, 1)                              # at most 254: amax is finite
    if RULE == "mse":
        gain = halved_scale_gain(y, exp2(127 - byte), PTX, R, N)
        byte = tl.where(gain > 0, tl.maximum(byte - 1, 1), byte)
    return byte


@triton.jit
def _nv_byte(amax, g, LARGEST: tl.constexpr):
    byte = e4m3_encode(tl.minimum(bits_float(amax) * tl.div_rn(g, LARGEST), 448.0))
    return tl.minimum(tl.maximum(byte, 0x01), 0x7E)


@triton.jit
def nv_scale(y, amax, g, RULE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """e4m3 bytes (int32 [R, N]) of groups y [R, N, 16]; g: the global scale, fp32."""
    byte = _nv_byte(amax, g, 6.0)
    if RULE == "mse":
        narrow = _nv_byte(amax, g, 4.0)
        s0 = e4m3_decode(byte)
        s1 = e4m3_decode(narrow)
        better = squared_error(y, tl.div_rn(g, s1), s1, R, N, 16) < squared_error(y, tl.div_rn(g, s0), s0, R, N, 16)
        byte = tl.where(better, narrow, byte)
    return byte


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_amax(y, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """Bits of the absolute maximum of every group of y [R, W]: int32 [R, W/G]; as integers NaN > Inf > any number."""
    return float_bits(tl.reduce(tl.reshape(tl.abs(y), (R, W // G, G)), 2, _nan_max))


@triton.constexpr_function
def _pack_ptx(native):
    """PTX of 8 floats -> 8 codes in a register: operands 1..4 are the low nibbles of its bytes, 5..8 the high ones.

    Without Blackwell's instruction, as `e2m1_code`: the rounded sum holds code + 298 in two bit fields, which are
    added; the low bytes (code + 0x2A) and the signs are gathered four at a time. """
    if native:
        pairs = "".join(f"cvt.rn.satfinite.e2m1x2.f32 t{j}, ${j + 5}, ${j + 1}; " for j in range(4))
        return "{ .reg .b8 t0, t1, t2, t3; " + pairs + "mov.b32 $0, {t0, t1, t2, t3}; }"
    lines = ["{ .reg .f32 a, p; .reg .b32 b, e, f, l, h, n;"]
    for operand in range(1, 9):
        lines.append(
            f".reg .b32 s{operand}; abs.f32 a, ${operand}; min.f32 a, a, 0f40C00000; max.f32 p, a, 0f3F800000; "
            "mov.b32 b, p; and.b32 b, b, 0x7F800000; mov.b32 p, b; fma.rn.f32 a, p, 0f4A800000, a; mov.b32 b, a; "
            f"shr.u32 e, b, 22; add.u32 s{operand}, b, e;"
        )
    for target, first in (("l", 1), ("h", 5)):
        lines.append(f"prmt.b32 e, s{first}, s{first + 1}, 0x40; prmt.b32 f, s{first + 2}, s{first + 3}, 0x40; "
                     f"prmt.b32 {target}, e, f, 0x5410;")
    lines.append(f"shl.b32 h, h, 4; add.u32 n, l, h; add.u32 n, n, {-17 * 0x2A2A2A2A % 2**32};")
    for target, first in (("l", 1), ("h", 5)):
        lines.append(f"mov.b32 b, ${first}; mov.b32 e, ${first + 1}; prmt.b32 s1, b, e, 0x73; "
                     f"mov.b32 b, ${first + 2}; mov.b32 e, ${first + 3}; prmt.b32 s2, b, e, 0x73; "
                     f"prmt.b32 {target}, s1, s2, 0x5410;")
    lines.append("shr.u32 l, l, 4; lop3.b32 n, l, 0x08080808, n, 0xEA; lop3.b32 $0, h, 0x80808080, n, 0xEA; }")
    return " ".join(lines)


@triton.jit
def pack_codes(v, PTX: tl.constexpr, NATIVE: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """fp32 [R, W] -> two codes a byte, uint8 [R, W/2]. PTX: by assembly (not in the interpreter), NATIVE:
    Blackwell's."""
    low, high = tl.split(tl.reshape(v, (R, W // 2, 2)))
    if PTX:
        return tl.inline_asm_elementwise(
            _pack_ptx(NATIVE), "=r,f,f,f,f,f,f,f,f", [low, high], dtype=tl.uint8, is_pure=True, pack=4
        )
    return (e2m1_code(low) | (e2m1_code(high) << 4)).to(tl.uint8)


@triton.jit
def drop_bad(y, amax, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """y [R, W] with zeros for the groups whose `group_amax` is not finite: their codes are 0."""
    bad = tl.reshape(tl.broadcast_to((amax >= INF_BITS)[:, :, None], (R, W // G, G)), (R, W))
    return tl.where(bad, 0.0, y)


@triton.jit
def quantize_tile(
    y, amax, g, FORMAT: tl.constexpr, RULE: tl.constexpr, SCALED: tl.constexpr, PTX: tl.constexpr, NATIVE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):
    """y fp32 [R, W] after `drop_bad`, amax of before -> (codes uint8 [R, W/2], scales uint8 [R, W/G]); a group that had
    NaN or Inf gets the NaN mark. SCALED says whether g is anything but 1."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    N: tl.constexpr = W // G
    bad = amax >= INF_BITS
    amax = tl.where(bad, 0, amax)
    groups = tl.reshape(y, (R, N, G))
    if FORMAT == "mxfp4":
        byte = mx_scale(groups, amax, RULE, R, N)
        inverse = exp2(127 - byte)
        if SCALED:
            inverse = inverse * g
        mark: tl.constexpr = MX_NAN
    else:
        byte = nv_scale(groups, amax, g, RULE, R, N)
        inverse = tl.div_rn(g, e4m3_decode(byte))
        mark: tl.constexpr = NV_NAN
    codes = pack_codes(tl.reshape(groups * inverse[:, :, None], (R, W)), PTX, NATIVE, R, W)
    return codes, tl.where(bad, mark, byte).to(tl.uint8)
