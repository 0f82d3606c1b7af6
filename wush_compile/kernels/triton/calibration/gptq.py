"""The inner loop of GPTQ in one Triton kernel: the channels of a group, one after the other (docs/spec.md §3, §4).

A program takes R weight rows. Their residuals stay in registers from the group's last channel to its first, so that
only the rounding is sequential. Residuals are float64; scales and codes are computed in fp32, as `formats.py` defines
them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import FORMATS, GAUSSIAN_CLIP
from ..common.formats import (
    INF_BITS,
    MX_NAN,
    NV_NAN,
    bits_float,
    e2m1_code,
    e4m3_decode,
    e4m3_factor,
    e8m0_factor,
    exp2,
    float_bits,
    group_amax,
    mx_scale,
    nv_scale,
    tree_sum,
)

PROGRAM_ROWS, PROGRAM_WARPS = 32, 1
GAUSSIAN_STEP = tl.constexpr(2 * GAUSSIAN_CLIP / 15)


@triton.jit
def _column(x, columns, j):
    """Column j of x [R, G] -> [R]: the sum has one term, so it is exact."""
    return tl.sum(tl.where(columns[None, :] == j, x, 0.0), axis=1)


@triton.jit
def _round_bf16(x):
    """fp32, finite -> the nearest bf16 value, ties to even, as fp32: Triton's interpreter truncates instead."""
    bits = float_bits(x)
    return bits_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536)


@triton.jit
def _int4_error(x, s, R: tl.constexpr):
    """Σ (x - decode(encode(x)))² of groups x [R, 32] with scales s [R], fp32."""
    q = tl.minimum(tl.maximum(tl.floor(tl.div_rn(x, tl.where(s > 0, s, 1.0)[:, None])), -8.0), 7.0)
    q = tl.where((s > 0)[:, None], q, 0.0)
    d = x - (q + 0.5) * s[:, None]
    return tl.reshape(tree_sum(tl.reshape(d * d, (R, 1, 32)), R, 1, 32), (R,))


@triton.jit
def _int4_scale(x, amax, RULE: tl.constexpr, R: tl.constexpr):
    """Scales (fp32 holding bf16 values, [R]) of groups x [R, 32]; amax [R]: bits of the absolute maximum, finite."""
    absmax = _round_bf16(bits_float(amax) * 0.125)
    if RULE == "absmax":
        return absmax
    mean = tl.reshape(tree_sum(tl.reshape(x * x, (R, 1, 32)), R, 1, 32), (R,)) * 0.03125
    gaussian = _round_bf16(tl.sqrt_rn(mean) * GAUSSIAN_STEP)
    if RULE == "mse":
        return tl.where(_int4_error(x, gaussian, R) < _int4_error(x, absmax, R), gaussian, absmax)
    return gaussian


@triton.jit(do_not_specialize=["N", "row_stride", "column_stride", "weight_stride", "each", "weights"])
def round_group_kernel(
    w,
    z,
    unit,
    global_scale,
    codes,
    scales,
    error,
    N,
    row_stride,
    column_stride,
    weight_stride,
    each,
    weights,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
):
    """w, z, error float64 [G, N] and codes uint8 [G, N], dense; scales [N]; unit float64 [weights, G, G] by strides.

    `each` rows belong to one weight, then come those of the next, and behind the last one those of the first again.
    Grid (tiles of R of these rows, N/each)."""
    first = tl.program_id(0) * R
    weight = tl.program_id(1) % weights
    own = first + tl.arange(0, R)
    rows = own.to(tl.int64) + tl.program_id(1).to(tl.int64) * each
    unit += weight.to(tl.int64) * weight_stride
    inside = (own < each) & (rows < N)
    columns = tl.arange(0, G)
    at = columns.to(tl.int64)[None, :] * N + rows[:, None]
    values = tl.load(w + at, mask=inside[:, None], other=0.0)  # [R, G]
    residual = tl.load(z + at, mask=inside[:, None], other=0.0)
    g = 1.0
    if SCALED:
        g = tl.load(global_scale + weight)

    # The best weights of the group, given the channels that are already quantized: w + (z - w) U⁻¹.
    shift = residual - values
    if RULE != "given":
        for i in range(G - 1):
            j = G - 1 - i
            u = tl.load(unit + j.to(tl.int64) * row_stride + columns * column_stride, mask=columns < j, other=0.0)
            shift -= _column(shift, columns, j)[:, None] * u[None, :]
    updated = (values + shift).to(tl.float32)

    bits = group_amax(updated, R, G, G)  # [R, 1]
    bad = bits >= INF_BITS
    updated = tl.where(bad, 0.0, updated)
    amax = tl.where(bad, 0, bits)
    groups = tl.reshape(updated, (R, 1, G))
    if FORMAT == "mxfp4":
        if RULE == "given":
            byte = tl.load(scales + rows, mask=inside, other=1).to(tl.int32)[:, None]
            bad = byte == MX_NAN
            byte = tl.where(bad, 1, byte)
        else:
            byte = mx_scale(groups, amax, RULE, R, 1)
        inverse = tl.reshape(exp2(127 - byte), (R,)) * g
        byte = tl.where(bad, MX_NAN, byte)
        scale = tl.reshape(e8m0_factor(byte), (R,))
        tl.store(scales + rows, tl.reshape(byte, (R,)).to(tl.uint8), mask=inside)
    elif FORMAT == "nvfp4":
        if RULE == "given":
            byte = tl.load(scales + rows, mask=inside, other=1).to(tl.int32)[:, None]
            bad = byte == NV_NAN
            byte = tl.where(bad, 1, byte)
        else:
            byte = nv_scale(groups, amax, g, RULE, R, 1)
        inverse = tl.reshape(tl.div_rn(g, e4m3_decode(byte)), (R,))
        byte = tl.where(bad, NV_NAN, byte)
        scale = tl.reshape(e4m3_factor(byte), (R,))
        tl.store(scales + rows, tl.reshape(byte, (R,)).to(tl.uint8), mask=inside)
    else:
        if RULE == "given":
            scale = tl.load(scales + rows, mask=inside, other=0.0).to(tl.float32)
            bad = (scale != scale)[:, None]
        else:
            scale = _int4_scale(updated, tl.reshape(amax, (R,)), RULE, R)
        inverse = tl.where(scale > 0, scale, 1.0)  # the divisor
        scale = tl.where(tl.reshape(bad, (R,)), float("nan"), scale)
        tl.store(scales + rows, scale.to(tl.bfloat16), mask=inside)
    spoiled = tl.reshape(bad, (R,))
    # In float64: the error is that of the decoded value, and the division by g is the only inexact step of decoding.
    factor = scale.to(tl.float64) / g.to(tl.float64) if SCALED else scale.to(tl.float64)

    for i in range(G):
        j = G - 1 - i
        v = _column(residual, columns, j).to(tl.float32)
        if FORMAT == "int4":
            q = tl.minimum(tl.maximum(tl.floor(tl.div_rn(v, inverse)), -8.0), 7.0)
            value = (q + 0.5).to(tl.float64) * factor
            code = tl.where((scale > 0) & ~spoiled, q.to(tl.int32) & 15, 0)
        else:
            code = e2m1_code(v * inverse)
            magnitude = code & 7
            # Twice the value of code c: 0, 1, 2, 3, 4, 6, 8, 12.
            double = magnitude + tl.maximum(magnitude - 4, 0) + 2 * tl.maximum(magnitude - 6, 0)
            value = (tl.where(code >= 8, -double, double)).to(tl.float64) * 0.5 * factor
            code = tl.where(spoiled, 0, code)
        e = tl.load(w + j.to(tl.int64) * N + rows, mask=inside, other=0.0) - value
        tl.store(codes + j.to(tl.int64) * N + rows, code.to(tl.uint8), mask=inside)
        tl.store(error + j.to(tl.int64) * N + rows, e, mask=inside)
        u = tl.load(unit + j.to(tl.int64) * row_stride + columns * column_stride, mask=columns < j, other=0.0)
        residual += e[:, None] * u[None, :]


def round_group(
    w: Tensor,
    z: Tensor,
    unit: Tensor,
    format: str,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
    each: int | None = None,
) -> None:
    """One quantization group of all rows, from its last channel to its first; fills codes, scales and error.

    w float64 [G, N]: the weights, transposed. z float64 [G, N]: the value that each channel is rounded from if no later
    channel of the group has an error. unit float64 [G, G]: the group's diagonal block of the unit lower factor.
    Of E weights side by side unit is [E, G, G], g [E], and each the number of rows of one; their rows [.., E·N] may
    come several times. g: fp32 [1] or None. codes uint8 [G, N], one a byte; scales [N] in the format's dtype.
    error float64 [G, N]: w - Q(w). With the rule `given` the scales are an input.
    """
    assert all(t.is_contiguous() for t in (w, z, codes, scales, error))
    rows, each = w.shape[1], each or w.shape[1]
    weights, strides = (
        (1, (*unit.stride(), 0)) if unit.dim() == 2 else (len(unit), (*unit.stride()[1:], unit.stride(0)))
    )
    round_group_kernel[(triton.cdiv(each, PROGRAM_ROWS), rows // each)](
        w,
        z,
        unit,
        g,
        codes,
        scales,
        error,
        rows,
        *strides,
        each,
        weights,
        format,
        rule,
        g is not None,
        FORMATS[format].group_size,
        PROGRAM_ROWS,
        num_warps=PROGRAM_WARPS,
        enable_fp_fusion=False,
    )


def available(device: torch.device) -> bool:
    """Whether the kernel runs on this device: it needs CUDA and, as Triton itself, sm_80."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
