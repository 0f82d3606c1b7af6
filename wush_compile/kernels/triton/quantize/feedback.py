"""Rounding with feedback (the package's `feedback.py`) of a tile: errors by elementwise arithmetic, what they add to
other channels by products with block-diagonal operands.

Output channel c = 16a + 4s + k of a tile is in step s. A thread holds 16 consecutive outputs or more (`dot.py`), so it
rounds four values of each 16 in every step. The errors of one step are the left operand of a product as they lie in the
registers: column 16v + 8h + 2t + i holds channel (W/4)t + 16v + 4s + 2h + i.
"""

import triton
import triton.language as tl

from ..common.formats import MX_LIMIT, bits_float, e2m1_magnitude, e4m3_decode
from .dot import output_order


@triton.jit
def load_step(feedback, first, STEP: tl.constexpr, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """bf16 [W/4, W]: what errors of step STEP add to the channels of the steps below it, in the same group; else 0."""
    W: tl.constexpr = SPEC.columns
    G: tl.constexpr = SPEC.group
    m = tl.arange(0, W // 4)
    n = tl.arange(0, W)
    source = (m // 2 % 4) * (W // 4) + m // 16 * 16 + 4 * STEP + m // 8 % 2 * 2 + m % 2
    target = (n // 2 % 4) * (W // 4) + n // 8 * 2 + n % 2
    step = target // 4 % 4
    inside = (source // G)[:, None] == (target // G)[None, :]
    inside = inside & (step < STEP)[None, :]
    if not EVEN:
        inside = inside & (first + target < SPEC.width)[None, :]
    place = (first // G + target // G) * 6 + (STEP * (STEP - 1) // 2 + step)
    apart = (source % G // 16 * 4 + source % 4)[:, None] ^ (target % G // 16 * 4 + target % 4)[None, :]
    return tl.load(feedback + (place[None, :] * (G // 4) + apart), mask=inside, other=0.0)


@triton.jit
def load_steps(feedback, first, SPEC: tl.constexpr, EVEN: tl.constexpr):
    """`load_step` of steps 1, 2, 3."""
    return (
        load_step(feedback, first, 1, SPEC, EVEN),
        load_step(feedback, first, 2, SPEC, EVEN),
        load_step(feedback, first, 3, SPEC, EVEN),
    )


@triton.jit
def _by_step(y, R: tl.constexpr, W: tl.constexpr):
    """[R, W] -> four [R, W/4], the channels of each step."""
    y = tl.reshape(tl.permute(tl.reshape(y, (R, W // 16, 4, 4)), (0, 1, 3, 2)), (R, W // 4, 2, 2))
    even, odd = tl.split(y)
    y0, y2 = tl.split(even)
    y1, y3 = tl.split(odd)
    return y0, y1, y2, y3


@triton.jit
def _by_channel(y0, y1, y2, y3, R: tl.constexpr, W: tl.constexpr):
    """The way back."""
    y = tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (R, W // 16, 4, 4))
    return tl.reshape(tl.permute(y, (0, 1, 3, 2)), (R, W))


# The error of rounding, q * unit - x: q is the e2m1 value of z * factor, found as in `common/formats.py:_ERROR_PTX`.
_ROUNDING_PTX = tl.constexpr(
    "{ .reg .f32 v, p, t; .reg .b32 b; mul.rn.f32 v, $1, $3; max.xorsign.abs.f32 p, v, 0f3F800000; mov.b32 b, p; "
    "and.b32 b, b, 0xFF800000; mov.b32 p, b; fma.rn.f32 t, p, 0f4A800000, v; fma.rn.f32 t, p, 0fCA800000, t; "
    "min.xorsign.abs.f32 t, t, 0f40C00000; mul.rn.f32 t, t, $4; sub.rn.f32 $0, t, $2; }"
)


@triton.jit
def _rounding_error(z, x, factor, unit, small, SPEC: tl.constexpr):
    """Errors of one step, bf16 [R, W/4], in the order of the left operand. z, x [R, W/4]: what is rounded, and what it
    stands for; factor, unit [R, W/G] of the groups; small: None, or which groups are rounded with feedback."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    N: tl.constexpr = SPEC.columns // SPEC.group
    EACH: tl.constexpr = SPEC.group // 4
    z = tl.reshape(z, (R, N, EACH))
    x = tl.reshape(x, (R, N, EACH))
    if SPEC.sm >= 86:
        factor = tl.broadcast_to(factor[:, :, None], (R, N, EACH))
        unit = tl.broadcast_to(unit[:, :, None], (R, N, EACH))
        error = tl.inline_asm_elementwise(
            _ROUNDING_PTX, "=f,f,f,f,f", [z, x, factor, unit], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        v = z * factor[:, :, None]
        magnitude = e2m1_magnitude(v)
        error = tl.where(v < 0, -magnitude, magnitude) * unit[:, :, None] - x
    if small is not None:
        error = tl.where(small[:, :, None], error, 0.0)
    error = tl.permute(tl.reshape(error, (R, 4, W // 64, 2, 2)), (0, 2, 3, 1, 4))
    return tl.reshape(error, (R, W // 4)).to(tl.bfloat16)


@triton.jit
def _spread(error, matrix, total, SPEC: tl.constexpr):
    """total fp32 [R, W] plus what errors add to all channels, in the order of the product's columns."""
    if SPEC.fp32_dot:
        return tl.dot(error.to(tl.float32), matrix.to(tl.float32), total, input_precision="ieee")
    return tl.dot(error, matrix, total)


@triton.jit
def values_to_round(y, amax, byte, factor, g, matrices, SPEC: tl.constexpr, CLEAN: tl.constexpr):
    """`feedback.values_to_round` of y fp32 [R, W], with the scale bytes int32 and factors fp32 [R, W/G] of its groups.

    matrices: of `load_steps`. amax: bits of the groups' absolute maxima; without CLEAN they are below MX_LIMIT."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    G: tl.constexpr = SPEC.group
    if SPEC.format == "mxfp4":
        unit = bits_float(byte << 23)
    else:
        unit = e4m3_decode(byte)
    if SPEC.scaled:
        unit = unit * tl.div_rn(1.0, g)
    small = None
    if CLEAN:
        small = amax < MX_LIMIT
    x0, x1, x2, x3 = _by_step(y, R, W)
    total = _spread(_rounding_error(x3, x3, factor, unit, small, SPEC), matrices[2], tl.zeros((R, W), tl.float32), SPEC)
    z2 = x2 - _by_step(output_order(total, SPEC), R, W)[2]
    total = _spread(_rounding_error(z2, x2, factor, unit, small, SPEC), matrices[1], total, SPEC)
    z1 = x1 - _by_step(output_order(total, SPEC), R, W)[1]
    total = _spread(_rounding_error(z1, x1, factor, unit, small, SPEC), matrices[0], total, SPEC)
    z0 = x0 - _by_step(output_order(total, SPEC), R, W)[0]
    z = _by_channel(z0, z1, z2, x3, R, W)
    if CLEAN:
        z = tl.where(tl.reshape(tl.broadcast_to(small[:, :, None], (R, W // G, G)), (R, W)), z, y)
    return z
