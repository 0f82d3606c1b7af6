"""MXFP4 and NVFP4 inside a Triton kernel: scale rules, rounding, decoding; the same bits as the package's `formats.py`.

Nothing here uses a tensor cast to or from fp8: ptxas 12.8 and 12.9 read an undefined register when one thread converts
several fp32 values to e4m3 and back on sm_90. Scales are rounded and decoded in integer and fp32 arithmetic. For the
same reason these functions run on any GPU and under Triton's interpreter.

`SM` is the newest instruction set that a function may use: 80, 86 or 100, or 0 for no assembly (`quantize/tiles.py`).

Kernels that call these are compiled with `enable_fp_fusion=False`: `mse` is defined without fused multiply-add.
"""

import triton
import triton.language as tl

INF_BITS = tl.constexpr(0x7F800000)
ABS_BITS = tl.constexpr(0x7FFFFFFF)
MX_LIMIT = tl.constexpr(0x71800000)  # bits of 2^100: at larger values the sums that round could overflow
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
    """(c, a + c) for a in [0, 8]: c = 2^(e + 22), e = the exponent of max(a, 1). So the addition rounds a, half to
    even, to a multiple of 2^(e - 1), which is e2m1's spacing there."""
    c = bits_float((float_bits(tl.maximum(a, 1.0)) & INF_BITS) + (22 << 23))
    return c, a + c


@triton.jit
def e2m1_magnitude(v):
    """fp32 -> the magnitude of the e2m1 value of `e2m1_code`, fp32."""
    c, total = _step_sum(tl.minimum(tl.abs(v), 6.0))
    return total - c


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
    """e4m3 byte as int32, not NaN -> fp32. In fp32's fields the byte is the value times 2^-120, subnormals included."""
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
    """[R, N, 2*HALF] -> [R, N, HALF], element 2i plus 2i + 1. A sum of two has no order, so the layout does not
    matter."""
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
def squared_error(y, inverse, unit, SM: tl.constexpr, R: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """`formats._squared_error` of [R, N, G] with factors [R, N]."""
    factor = tl.broadcast_to(inverse[:, :, None], (R, N, G))
    weight = tl.broadcast_to(unit[:, :, None], (R, N, G))
    if SM >= 86:
        terms = tl.inline_asm_elementwise(
            _ERROR_PTX, "=f,f,f,f", [y, factor, weight], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        a = tl.abs(y * factor)
        c, total = _step_sum(tl.minimum(a, 8.0))
        d = (a - tl.minimum(total - c, 6.0)) * weight
        # Not d * d: a compiler that may contract would fuse the product with the first sum.
        terms = tl.fma(d, d, 0.0)
    return tree_sum(terms, R, N, G)


# The terms of `formats._halved_scale_gain`. Clamping to [0, 1] is free, as a modifier of additions and products.
_GAIN_PTX = tl.constexpr(
    "{ .reg .f32 a, u, g, p; abs.f32 a, $1; fma.rn.f32 u, a, $2, 0fBF000000; abs.f32 u, u; "
    "add.rn.f32 u, u, 0fBE800000; abs.f32 u, u; sub.rn.sat.f32 g, 0f3E000000, u; "
    "fma.rn.sat.f32 p, a, $2, 0fC0600000; fma.rn.f32 $0, p, 0fC0800000, g; }"
)


@triton.jit
def halved_scale_gain(y, inverse, SM: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """`formats._halved_scale_gain` of [R, N, 32] with factors [R, N]."""
    factor = tl.broadcast_to(inverse[:, :, None], (R, N, 32))
    if SM > 0:
        terms = tl.inline_asm_elementwise(_GAIN_PTX, "=f,f,f", [y, factor], dtype=tl.float32, is_pure=True, pack=1)
    else:
        v = tl.abs(y * factor)
        gain = tl.maximum(0.125 - tl.abs(tl.abs(v - 0.5) - 0.25), 0.0)
        terms = gain - tl.minimum(tl.maximum(v - 3.5, 0.0), 1.0) * 4.0
    return tree_sum(terms, R, N, 32)


@triton.jit
def mx_scale(y, amax, RULE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SM: tl.constexpr = 0):
    """e8m0 bytes (int32 [R, N]) of groups y [R, N, 32]; amax: bits of the absolute maximum, finite."""
    if RULE == "paper":
        byte = amax >> 23
    elif RULE == "ocp":
        byte = (amax >> 23) - 2
    else:
        byte = ((amax + 0x3FFFFF) >> 23) - 2  # carries into the exponent from mantissas above 1.5
    byte = tl.maximum(byte, 1)  # at most 254: amax is finite
    if RULE == "mse":
        gain = halved_scale_gain(y, exp2(127 - byte), SM, R, N)
        byte = tl.where(gain > 0, tl.maximum(byte - 1, 1), byte)
    return byte


@triton.jit
def _nv_byte(amax, g, LARGEST: tl.constexpr):
    byte = e4m3_encode(tl.minimum(bits_float(amax) * tl.div_rn(g, LARGEST), 448.0))
    return tl.minimum(tl.maximum(byte, 0x01), 0x7E)


@triton.jit
def _nv_error(y, byte, g, SM: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    s = e4m3_decode(byte)
    return squared_error(y, tl.div_rn(g, s), s, SM, R, N, 16)


@triton.jit
def _nv_search(y, first, g, SM: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """`formats._search_nvfp4`. No maximum exceeds 10 times the chosen scale. It could where byte 3 or 2 becomes 2 or 1;
    but there the maximum alone loses more than the 15 other values can win."""
    best = first
    least = _nv_error(y, first, g, SM, R, N)
    for i in tl.static_range(3):
        byte = tl.maximum(first - 1, 0x01) if i == 0 else tl.minimum(first + (3 + i), 0x7E)
        error = _nv_error(y, byte, g, SM, R, N)
        best = tl.where(error < least, byte, best)
        least = tl.where(error < least, error, least)
    return best


@triton.jit
def nv_scale(y, amax, g, RULE: tl.constexpr, R: tl.constexpr, N: tl.constexpr, SM: tl.constexpr = 0):
    """e4m3 bytes (int32 [R, N]) of groups y [R, N, 16]; g: the global scale, fp32. With SM > 0, for
    values of at most 2^100 times their scale."""
    byte = _nv_byte(amax, g, 6.0)
    if RULE == "mse":
        narrow = _nv_byte(amax, g, 4.0)
        s0 = e4m3_decode(byte)
        s1 = e4m3_decode(narrow)
        e0 = squared_error(y, tl.div_rn(g, s0), s0, SM, R, N, 16)
        e1 = squared_error(y, tl.div_rn(g, s1), s1, SM, R, N, 16)
        byte = tl.where(e1 < e0, narrow, byte)
    elif RULE == "search":
        byte = _nv_search(y, byte, g, SM, R, N)
    return byte


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_max_magnitude(a, b):
    """The larger magnitude, with some sign: absolute values would need one more instruction."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def group_amax(y, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr, SM: tl.constexpr = 0):
    """Bits of the absolute maximum of every group of y [R, W]: int32 [R, W/G]; as integers NaN > Inf > any number."""
    if SM >= 86:
        return float_bits(tl.reduce(tl.reshape(y, (R, W // G, G)), 2, _nan_max_magnitude)) & ABS_BITS
    return float_bits(tl.reduce(tl.reshape(tl.abs(y), (R, W // G, G)), 2, _nan_max))


@triton.jit
def drop_bad(y, amax, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """y [R, W] with zeros for the groups whose `group_amax` is not finite: their codes are 0."""
    bad = tl.reshape(tl.broadcast_to((amax >= INF_BITS)[:, :, None], (R, W // G, G)), (R, W))
    return tl.where(bad, 0.0, y)


@triton.jit
def times_factor(y, factor, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr):
    """y [R, W] times its groups' factors [R, W/G]."""
    return tl.reshape(tl.reshape(y, (R, W // G, G)) * factor[:, :, None], (R, W))
