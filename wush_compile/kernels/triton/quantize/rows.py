"""What one program of a quantizer kernel does: walk row tiles of W columns, transform, quantize and store each."""

import triton
import triton.language as tl

from ..common.formats import (
    INF_BITS,
    MX_LIMIT,
    MX_NAN,
    NV_NAN,
    e4m3_decode,
    exp2,
    float_bits,
    group_amax,
    mx_scale,
    nv_scale,
)
from ..common.overlap import wait_arrivals
from .dot import clean_dot, dot, load_operand
from .feedback import load_steps, values_to_round
from .load import apply_prologue, load_rows, load_tile, prefetch
from .store import store_scales, store_values


@triton.jit
def group_scales(y, amax, g, SPEC: tl.constexpr, SM: tl.constexpr):
    """y fp32 [R, W], bits of its groups' absolute maxima, finite -> (scale bytes int32, factors fp32), [R, W/G]."""
    R: tl.constexpr = SPEC.rows
    N: tl.constexpr = SPEC.columns // SPEC.group
    RULE: tl.constexpr = SPEC.rule
    groups = tl.reshape(y, (R, N, SPEC.group))
    if SPEC.format == "mxfp4":
        byte = mx_scale(groups, amax, RULE, R, N, SM)
        factor = exp2(127 - byte)
        if SPEC.scaled:
            factor = factor * g
    else:
        byte = nv_scale(groups, amax, g, RULE, R, N, SM)
        factor = tl.div_rn(g, e4m3_decode(byte))
    return byte, factor


@triton.jit
def quantize_tile(
    x,
    operand,
    matrices,
    g,
    codes,
    scales,
    row,
    left,
    shift,
    first,
    SPEC: tl.constexpr,
    CLEAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Transforms (B > 0), quantizes and stores one tile x [R, W]; returns the bits of the groups' absolute maxima.

    Correct while these are below the program's limit; with CLEAN, correct for any values."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    G: tl.constexpr = SPEC.group
    EVEN: tl.constexpr = SPEC.width % W == 0 and not (SPEC.swizzled and SPEC.width // G % 4 != 0)
    y = x.to(tl.float32)
    if SPEC.block > 0:
        y = dot(x, operand, SPEC)
    if CLEAN:
        y, amax = clean_dot(y, x, operand, SPEC)
        bad = amax >= INF_BITS
        byte, factor = group_scales(y, tl.where(bad, 0, amax), g, SPEC, 0)
        if SPEC.feeds_back:
            y = values_to_round(y, amax, byte, factor, g, matrices, SPEC, True)
        byte = tl.where(bad, MX_NAN if SPEC.format == "mxfp4" else NV_NAN, byte)
        store_values(codes, y, byte, factor, row, left, first, SPEC, 0, False, 0, MASKED, EVEN)
    else:
        amax = group_amax(y, R, W, G, SPEC.sm)
        byte, factor = group_scales(y, amax, g, SPEC, SPEC.sm)
        if SPEC.feeds_back:
            y = values_to_round(y, amax, byte, factor, g, matrices, SPEC, False)
        UNSCALED_MX: tl.constexpr = SPEC.format == "mxfp4" and not SPEC.scaled
        if SPEC.feeds_back or (SPEC.format == "mxfp4" and SPEC.scaled):
            MOST: tl.constexpr = 0
        elif SPEC.format == "mxfp4" and SPEC.rule == "absmax":
            MOST: tl.constexpr = 6
        else:
            MOST: tl.constexpr = 10
        BY_GROUP: tl.constexpr = UNSCALED_MX and SPEC.sm > 0
        store_values(codes, y, byte, factor, row, left, first, SPEC, SPEC.words, BY_GROUP, MOST, MASKED, EVEN)
    store_scales(scales, byte, row, left, shift, first, SPEC, MASKED)
    return amax


@triton.jit
def load_weights(program, t, feedback, global_scale, SPEC: tl.constexpr):
    """What program number `program` of `transform_quantize_kernel` reads beside x: the transform's operand, the
    matrices of `load_steps`, and the global scale."""
    W: tl.constexpr = SPEC.columns
    N: tl.constexpr = _scales_of_a_row(SPEC)
    EVEN: tl.constexpr = SPEC.width % W == 0 and N * SPEC.group == SPEC.width
    first = program % ((N * SPEC.group + W - 1) // W) * W
    g = tl.full((), 1.0, tl.float32)
    if SPEC.scaled:
        g = tl.load(global_scale)
    operand = 0.0
    if SPEC.block > 0:
        operand = load_operand(t, first, SPEC, EVEN)
    matrices = (0.0, 0.0, 0.0)
    if SPEC.feeds_back:
        matrices = load_steps(feedback, first, SPEC, EVEN)
    return operand, matrices, g


@triton.constexpr_function
def _scales_of_a_row(spec):
    groups = spec.width // spec.group
    return (groups + 3) // 4 * 4 if spec.swizzled else groups


@triton.jit
def quantize_rows(
    program,
    weights,
    arrivals,
    x,
    up,
    weight,
    bias,
    mean,
    scale,
    kept,
    codes,
    scales,
    M,
    pitch,
    up_pitch,
    SPEC: tl.constexpr,
):
    """The part of program number `program` of `transform_quantize_kernel`; weights: of `load_weights`.

    mean, scale: a norm's statistics, as pointers to those of all rows, or as tiles [R, 1]. kept: None, or where the
    norm, with `up` the sum, is written, dense [M, K]. arrivals: None, or what to
    wait for (`overlap.wait_arrivals`) before these pointers are read."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    G: tl.constexpr = SPEC.group
    K: tl.constexpr = SPEC.width
    TILES: tl.constexpr = SPEC.tiles
    N: tl.constexpr = _scales_of_a_row(SPEC)
    COLUMNS: tl.constexpr = (N * G + W - 1) // W
    EVEN: tl.constexpr = K % W == 0 and N * G == K
    stride = SPEC.stride if SPEC.stride > 0 else pitch
    first = program % COLUMNS * W
    start = program // COLUMNS * (R * TILES)
    left = M - start
    row = start.to(tl.int64)
    x += row * stride + (2 if SPEC.limit > 0 else 1) * first
    if up is not None:
        up += row * up_pitch + first
    if mean is not None:
        if mean.dtype.is_ptr():
            mean += start
    if scale is not None:
        if scale.dtype.is_ptr():
            scale += start
    if kept is not None:
        kept += row * K + first
    codes += row * (K // 2) + first // 2
    shift = 0
    if SPEC.swizzled:
        shift = start % 128 if R * TILES % 128 != 0 else 0
        scales += (row - shift) * N
    else:
        scales += row * N + first // G
    columns = first + tl.arange(0, W)[None, :]
    if weight is not None:
        weight = tl.load(weight + columns, mask=columns < K, other=0.0)
    if bias is not None:
        bias = tl.load(bias + columns, mask=columns < K, other=0.0)
    source = (x, up, weight, bias, mean, scale, kept, stride, up_pitch)
    operand, matrices, g = weights
    if TILES > 1 and EVEN:
        # The first rows travel while the matrices do.
        prefetch(x + tl.minimum(tl.arange(0, 2 * R), left - 1) * stride, SPEC.sm)
    # NaN, Inf, huge values and saturated scales are rare. They reach the limit, and then a second pass, which is right
    # for any values, overwrites what the first one wrote.
    limit = MX_LIMIT
    if SPEC.format == "nvfp4":
        # A scale saturates where g * amax passes 448 * 6 = 2688, the largest e4m3 value times the largest e2m1 value.
        # 0.3 % less, for the division by g, which is approximate. A limit too low costs time only.
        limit = tl.minimum(float_bits(2680.0 / g), INF_BITS)
    if TILES == 1:
        tile = load_rows(x, 0, left, stride, first, SPEC, True, EVEN, 0.0 if up is None else 1.0)
        if arrivals is not None:
            wait_arrivals(arrivals)
        tile = apply_prologue(tile, source, 0, left, first, SPEC, True, EVEN)
        largest = quantize_tile(tile, operand, matrices, g, codes, scales, 0, left, shift, first, SPEC, False, True)
        if tl.max(tl.reshape(largest, (R * W // G,)), axis=0) >= limit:
            tl.debug_barrier()
            tile = load_tile(source, 0, left, first, SPEC, True, EVEN)
            quantize_tile(tile, operand, matrices, g, codes, scales, 0, left, shift, first, SPEC, True, True)
    else:
        if arrivals is not None:
            wait_arrivals(arrivals)
        # Whole tiles need no masks. The rows below the last whole tile are left to the second pass.
        done = tl.minimum(left // R, TILES)
        largest = tl.zeros((R, W // G), tl.int32)
        for i in tl.range(0, done, num_stages=SPEC.load_stages):
            tile = load_tile(source, i * R, left, first, SPEC, False, EVEN)
            amax = quantize_tile(
                tile, operand, matrices, g, codes, scales, i * R, left, shift, first, SPEC, False, False
            )
            largest = tl.maximum(largest, amax)
        if tl.max(tl.reshape(largest, (R * W // G,)), axis=0) >= limit:
            done = 0
            tl.debug_barrier()
        end = tl.cdiv(left + shift, 128) * 128 - shift if SPEC.swizzled else left
        for i in tl.range(done, tl.minimum(tl.cdiv(end, R), TILES), num_stages=1):
            tile = load_tile(source, i * R, left, first, SPEC, True, EVEN)
            quantize_tile(tile, operand, matrices, g, codes, scales, i * R, left, shift, first, SPEC, True, True)
