"""Activations of 8 and 16 bits: the block transform, then e4m3 with one scale a row, or the model dtype. And NVFP4
activations as Hopper's products read them (layout `lanes`).

A row's scale needs the maximum of all its transformed values. So a launch has two kinds of programs: the first store
the maxima of their part of the rows, the second wait for those of the whole rows, transform the same tiles again, whose
x is in L2, and encode them. Programs of the first kind have the lower numbers (`overlap.wait_arrivals`).

A row with NaN or Inf has the scale NaN in fp8. In the model dtype its NaN may reach other blocks of the row, which the
product does anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import E4M3_MAX, FP8_LEAST_MAX
from ....ops.layouts import operand_of
from ..common.formats import (
    ABS_BITS,
    INF_BITS,
    NV_NAN,
    bits_float,
    drop_bad,
    e2m1_magnitude,
    e4m3_encode,
    e4m3_factor,
    float_bits,
    group_amax,
    times_factor,
)
from ..common.memory import multiprocessors, workspace
from ..common.overlap import arrive, overlaps, start_next, wait_arrivals, wait_inputs
from .dot import dot, load_operand
from .feedback import load_steps, values_to_round
from .load import inside_mask, load_tile
from .prologue import Prologue
from .rows import group_scales
from .spec import gather_spec, make_spec
from .tiles import Tile, choose_tile, device_instructions
from .transform_quantize import dense_rows

# Behind so many rows in the layout `lanes` comes `fused`, whose programs crowd on few multiprocessors if they start
# early.
LATE_ROWS = 64
MOST_BANDS = 2**14  # tiles of rows in one launch
ENOUGH_PROGRAMS = 16  # a multiprocessor
H100_MULTIPROCESSORS = 132
LARGEST, LEAST_MAX = tl.constexpr(E4M3_MAX), tl.constexpr(FP8_LEAST_MAX)
STEP = tl.constexpr(1.0 / E4M3_MAX)


@triton.jit
def _transformed(x, up, t, left, first, stride, up_stride, SPEC: tl.constexpr):
    """fp32 [R, W]: the transformed columns from `first` on, of the rows that x and `up` point to."""
    EVEN: tl.constexpr = SPEC.width % SPEC.columns == 0
    x += (2 if SPEC.limit > 0 else 1) * first
    source = (x, None if up is None else up + first, None, None, None, None, None, stride, up_stride)
    tile = load_tile(source, 0, left, first, SPEC, True, EVEN)
    if SPEC.block > 0:
        return dot(tile, load_operand(t, first, SPEC, EVEN), SPEC)
    return tile.to(tl.float32)


@triton.jit
def _store_tile(codes, values, left, first, SPEC: tl.constexpr, LANES: tl.constexpr):
    """values [R, W] to columns from `first` on, of rows of K at `codes`; with LANES in the order of `layouts.to_lanes`,
    for whose 128 channels a tile has a multiple of 64."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    if LANES and SPEC.format == "fp8":
        # Channels (a, b, e, 4) of 64 -> places (e, b, half of the 128, a, 4): permuted before the store, in runs of 8.
        values = tl.permute(tl.reshape(values, (R, W // 64, 2, 4, 2, 4)), (0, 1, 4, 3, 2, 5))
        run = tl.arange(0, W // 8)
        half = first // 64 + run // 8
        place = half // 2 * 128 + half % 2 * 8 + run % 8 // 4 * 64 + run % 4 * 16
        rows = tl.arange(0, R)[:, None, None]
        place = place[None, :, None]
        inside = inside_mask(rows, left, place, SPEC.width, True, SPEC.width % W == 0)
        at = codes + (rows * SPEC.width + (place + tl.arange(0, 8)[None, None, :]))
        tl.store(at, tl.reshape(values, (R, W // 8, 8)), mask=inside)
    else:
        rows = tl.arange(0, R)[:, None]
        columns = first + tl.arange(0, W)[None, :]
        if LANES:
            # Channels (b, c, d, e) of 64 -> places (e, half of the 128, c, b, d).
            values = tl.permute(tl.reshape(values, (R, W // 64, 4, 4, 2, 2)), (0, 1, 5, 3, 2, 4))
            values = tl.reshape(values, (R, W))
            columns = columns // 128 * 128 + columns // 64 % 2 * 32 + columns % 64 // 32 * 64 + columns % 32
        inside = inside_mask(rows, left, columns, SPEC.width, True, SPEC.width % W == 0)
        tl.store(codes + (rows * SPEC.width + columns), values, mask=inside)


@triton.jit
def _nvfp4_values(y, g, feedback, first, SPEC: tl.constexpr):
    """y fp32 [R, W] -> the values of its NVFP4 codes and scales, which bf16 holds exactly, in fp32."""
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    amax = group_amax(y, R, W, SPEC.group, SPEC.sm)
    bad = amax >= INF_BITS
    y = drop_bad(y, amax, R, W, SPEC.group)
    byte, factor = group_scales(y, tl.where(bad, 0, amax), g, SPEC, 0)
    if SPEC.feeds_back:
        matrices = load_steps(feedback, first, SPEC, SPEC.width % W == 0)
        y = values_to_round(y, amax, byte, factor, g, matrices, SPEC, True)
    y = times_factor(y, factor, R, W, SPEC.group)
    values = times_factor(e2m1_magnitude(y), e4m3_factor(tl.where(bad, NV_NAN, byte)), R, W, SPEC.group)
    return tl.where(y < 0, -values, values)


@triton.jit
def _e4m3(y, SM: tl.constexpr):
    """fp32 -> e4m3 bytes, uint8: nearest, ties to even, at most 448."""
    if SM >= 89:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
            "mov.b32 $0, {a, b}; }",
            "=r,f,f,f,f",
            [y],
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        code = e4m3_encode(tl.minimum(tl.abs(y), LARGEST)) | ((float_bits(y) >> 24) & 0x80)
        return code.to(tl.uint8)


@triton.jit(do_not_specialize=["M"])
def token_kernel(
    x,
    up,
    t,
    feedback,
    global_scale,
    codes,
    scales,
    maxima,
    counters,
    M,
    pitch,
    up_pitch,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    LATE: tl.constexpr,
    SPEC: tl.constexpr,
):
    """x [M, K], its rows `pitch` apart, t [K/B or 1, B, B] -> codes uint8 [M, K], scales fp32 [M] (SPEC.format fp8); or
    codes [M, K] in x's dtype (none); or bf16 [M, K] (nvfp4). LANES: the layout `lanes`; nvfp4 has no other here.

    A program takes SPEC.rows rows, and TILES tiles of SPEC.columns columns: a part. maxima: int32 [M, parts], counters:
    int32, one for each tile of rows, zeros before and after; both for fp8 only. Grid: for each tile of rows, one
    program for each part; with fp8 one that finds maxima, and later one that encodes. `up` belongs to the prologue.
    LATE: the next kernel starts when this one ends."""
    wait_inputs(SPEC.pdl)
    if not LATE:
        start_next(SPEC.pdl)
    R: tl.constexpr = SPEC.rows
    K: tl.constexpr = SPEC.width
    COLUMNS: tl.constexpr = (K + SPEC.columns - 1) // SPEC.columns
    PARTS: tl.constexpr = (COLUMNS + TILES - 1) // TILES
    FP8: tl.constexpr = SPEC.format == "fp8"
    PROGRAMS: tl.constexpr = 2 * PARTS if FP8 else PARTS
    stride = SPEC.stride if SPEC.stride > 0 else pitch
    band = tl.program_id(0) // PROGRAMS
    place = tl.program_id(0) % PROGRAMS
    begin = place % PARTS * TILES
    end = tl.minimum(begin + TILES, COLUMNS)
    left = M - band * R
    row = band.to(tl.int64) * R
    x += row * stride
    codes += row * K
    if up is not None:
        up += row * up_pitch
    if FP8:
        rows = tl.arange(0, R)
        maxima += row * PARTS
        if place < PARTS:
            amax = tl.zeros((R,), tl.int32)
            for i in tl.range(begin, end, num_stages=1):
                y = _transformed(x, up, t, left, i * SPEC.columns, stride, up_pitch, SPEC)
                amax = tl.maximum(amax, tl.max(float_bits(y) & ABS_BITS, axis=1))  # NaN > Inf > any number
            tl.store(maxima + rows * PARTS + place, amax, mask=rows < left)
            arrive(counters + band)
        else:
            if TILES == 1:  # the transform does not wait for the maxima
                only = _transformed(x, up, t, left, begin * SPEC.columns, stride, up_pitch, SPEC)
            wait_arrivals((counters + band, PARTS, PARTS))
            amax = tl.zeros((R,), tl.int32)
            for i in tl.range(0, PARTS, 32, num_stages=1):
                parts = i + tl.arange(0, 32)[None, :]
                inside = (rows < left)[:, None] & (parts < PARTS)
                some = tl.load(maxima + (rows * PARTS)[:, None] + parts, mask=inside, other=0)
                amax = tl.maximum(amax, tl.max(some, axis=1))
            finite = amax < INF_BITS
            largest = tl.maximum(bits_float(tl.where(finite, amax, 0x3F800000)), LEAST_MAX)
            factor = tl.div_rn(1.0, largest) * LARGEST  # what PyTorch makes of a number over a tensor
            if place == PARTS:
                scale = tl.where(finite, largest * STEP, float("nan"))
                tl.store(scales + row + rows, scale, mask=rows < left)
            for i in tl.range(begin, end, num_stages=1):
                if TILES == 1:
                    y = only
                else:
                    y = _transformed(x, up, t, left, i * SPEC.columns, stride, up_pitch, SPEC)
                y = tl.where(finite[:, None], y, 0.0) * factor[:, None]
                _store_tile(codes, _e4m3(y, SPEC.sm), left, i * SPEC.columns, SPEC, LANES)
    else:
        g = tl.full((), 1.0, tl.float32)
        if SPEC.scaled:
            g = tl.load(global_scale)
        for i in tl.range(begin, end, num_stages=1):
            y = _transformed(x, up, t, left, i * SPEC.columns, stride, up_pitch, SPEC)
            if SPEC.format == "nvfp4":
                y = _nvfp4_values(y, g, feedback, i * SPEC.columns, SPEC)
            _store_tile(codes, y.to(codes.dtype.element_ty), left, i * SPEC.columns, SPEC, LANES)
    if LATE:
        start_next(SPEC.pdl)


@triton.jit(do_not_specialize=["M"])
def flat_token_kernel(
    x,
    t,
    feedback,
    global_scale,
    codes,
    scales,
    maxima,
    counters,
    M,
    pitch,
    TILES: tl.constexpr,
    width: tl.constexpr,
    stride: tl.constexpr,
    group: tl.constexpr,
    block: tl.constexpr,
    shared: tl.constexpr,
    feeds_back: tl.constexpr,
    format: tl.constexpr,
    rule: tl.constexpr,
    scaled: tl.constexpr,
    swizzled: tl.constexpr,
    prologue: tl.constexpr,
    limit: tl.constexpr,
    sm: tl.constexpr,
    fp32_dot: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    tiles: tl.constexpr,
    load_stages: tl.constexpr,
    words: tl.constexpr,
    pdl: tl.constexpr,
):
    """`token_kernel` without a prologue, as `transform_quantize.flat_transform_quantize_kernel`."""
    SPEC: tl.constexpr = gather_spec(
        width,
        stride,
        group,
        block,
        shared,
        feeds_back,
        format,
        rule,
        scaled,
        swizzled,
        prologue,
        limit,
        sm,
        fp32_dot,
        rows,
        columns,
        tiles,
        load_stages,
        words,
        pdl,
    )
    token_kernel(
        x, None, t, feedback, global_scale, codes, scales, maxima, counters, M, pitch, 0, TILES, False, False, SPEC
    )


def choose_tokens(
    rows: int, width: int, block: int, format: str, multiprocessors: int = H100_MULTIPROCESSORS
) -> tuple[Tile, int]:
    """(tile, tiles of columns that a program takes).

    A program takes several tiles only where the launch has `ENOUGH_PROGRAMS` for each multiprocessor then: fewer maxima
    a row then, but the tiles of a program come one after the other. Eight tiles a program were measured to cost 16 us
    at 128 rows of 4096, where one tile costs 3 us at 64 rows. The rule between them follows from counting; no run has
    compared others."""
    tile = choose_tile(rows, width, block)._replace(tiles=1, stages=1)
    if block:
        tile = tile._replace(columns=max(tile.columns, 64))
    if format != "fp8" or not block:
        return tile, 1
    programs = 2 * triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    return tile, max(1, min(8, programs // (ENOUGH_PROGRAMS * multiprocessors)))


def quantize_tokens(
    x: Tensor,
    transform: Tensor | None,
    format: str,
    prologue: Prologue = Prologue(),
    plan: tuple[Tile, int] | None = None,
    lanes: bool = False,
    global_scale: Tensor | None = None,
    rule: str = "",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for fp8 and none (`formats.ACTIVATION_FORMATS`), and for nvfp4 in the layout `lanes`.

    x [.., K] bf16, fp16 or fp32 -> codes uint8 [.., K], scales fp32 [.., 1]; or x's dtype [.., K], fp32 [.., 0].
    prologue: an activation, gated or not, or nothing. lanes: the layout `lanes`; K is a multiple of 128, and the tiles'
    columns one of 64. global_scale, rule, feedback: of nvfp4 alone."""
    rows = dense_rows(x)
    count, width = rows.shape[0], rows.shape[1] // (2 if prologue.limit else 1)
    columns, dtype, groups, scale_dtype = operand_of(format, width, x.dtype, "lanes" if lanes else "rows")
    codes = torch.empty((*x.shape[:-1], columns), dtype=dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], groups), dtype=scale_dtype, device=x.device)
    if codes.numel() == 0:
        return codes, scales
    block, processors = 0 if transform is None else transform.shape[-1], H100_MULTIPROCESSORS
    if x.is_cuda:
        processors = multiprocessors(x.device.index)
    tile, tiles = plan or choose_tokens(count, width, block, format, processors)
    parts, programs = triton.cdiv(triton.cdiv(width, tile.columns), tiles), 2 if format == "fp8" else 1
    sm = device_instructions(x.device.index) if x.is_cuda else 0
    pdl = x.is_cuda and overlaps(x.device.index)
    fused = dict(prologue=prologue.name, limit=prologue.limit)
    spec = make_spec(
        rows, transform, global_scale, format, rule, tile, sm, **fused, pdl=pdl, feeds_back=feedback is not None
    )
    up = None if prologue.up is None else dense_rows(prologue.up)
    t = None if transform is None else transform.contiguous()
    feedback = None if feedback is None else feedback.contiguous()
    flat_codes, flat_scales = codes.view(count, columns), scales.view(count, groups)
    for start in range(0, count, tile.rows * MOST_BANDS):
        some = slice(start, start + tile.rows * MOST_BANDS)
        part = rows[some]
        bands = triton.cdiv(part.shape[0], tile.rows)
        maxima = counters = None
        if format == "fp8":
            maxima = torch.empty((part.shape[0], parts), dtype=torch.int32, device=x.device)
            counters = workspace(x.device).counters(bands)
        token_kernel[(bands * parts * programs,)](
            part,
            None if up is None else up[some],
            t,
            feedback,
            global_scale,
            flat_codes[some],
            flat_scales[some],
            maxima,
            counters,
            part.shape[0],
            rows.stride(0),
            0 if up is None else up.stride(0),
            tiles,
            lanes,
            lanes and count <= LATE_ROWS,
            spec,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if pdl else {}),
        )
    return codes, scales
