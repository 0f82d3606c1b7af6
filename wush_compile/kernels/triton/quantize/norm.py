"""A norm in front of the quantizer, in one launch.

A norm needs a statistic of every row before the row's first value can be quantized. Three ways, of which none changes a
bit, since each adds up in the same order (`row_statistics`):

    own     Few rows: every program computes the statistics of its rows, which L2 serves to all of them.
    ahead   Programs of two kinds in one grid: some compute the statistics of whole rows, some quantize tiles of rows
            that were read a little earlier and are still in L2. So x comes from memory once.
    apart   A kernel for the statistics, then one that quantizes: x comes from memory twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..common.memory import workspace
from ..common.overlap import arrive, overlaps, start_next, wait_inputs
from .prologue import Prologue
from .tiles import Tile, assembly, choose_tile
from .transform_quantize import dense_rows, prepare, quantize_rows, transform_quantize

SEGMENT = 1024  # columns of a row that are added side by side: 16 bytes for 128 threads
DEPTH = tl.constexpr(10)  # SEGMENT = 2^DEPTH
LOADS = 16  # of 16 bytes, that a thread of a statistics program has under way


@triton.jit
def _row_sum(
    pointers,
    shift,
    SQUARES: tl.constexpr,
    CENTERED: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """fp32 [ROWS]: the sum of the rows that are pointed to [ROWS, 1], or with SQUARES that of the squares; with
    CENTERED of the values less `shift` [ROWS].

    Every SEGMENT-th value is added in turn, then those sums as a tree of neighbours: a sum of two has no order, so the
    result is the same for any number of rows and warps."""
    SPAN: tl.constexpr = SEGMENT * STEPS
    total = tl.zeros((ROWS, SEGMENT), tl.float32)
    for k in tl.range(0, K, SPAN, num_stages=1):
        columns = k + tl.arange(0, SEGMENT)[None, :]
        values = ()
        for i in tl.static_range(STEPS):  # all loads first
            if K % SPAN == 0:
                values += (tl.load(pointers + (columns + i * SEGMENT)),)
            else:
                values += (tl.load(pointers + (columns + i * SEGMENT), mask=columns + i * SEGMENT < K, other=0.0),)
        for i in tl.static_range(STEPS):
            value = values[i].to(tl.float32)
            if CENTERED:
                value -= shift[:, None]
                if K % SPAN != 0:
                    value = tl.where(columns + i * SEGMENT < K, value, 0.0)
            if SQUARES:
                total = tl.fma(value, value, total)
            else:
                total += value
    for i in tl.static_range(DEPTH):
        total = tl.sum(tl.reshape(total, (ROWS, SEGMENT >> (i + 1), 2)), axis=2)
    return tl.reshape(total, (ROWS,))


@triton.jit
def row_statistics(
    pointers,
    eps,
    PTX: tl.constexpr,
    CENTERED: tl.constexpr,
    EPS_TENSOR: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(mean, scale), fp32 [ROWS], of the rows that are pointed to [ROWS, 1]: 0 and rsqrt(mean(x^2) + eps), or with
    CENTERED the mean and rsqrt(variance + eps). eps: a number, or with EPS_TENSOR a pointer to one."""
    if EPS_TENSOR:
        eps = tl.load(eps).to(tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    if CENTERED:
        mean = _row_sum(pointers, mean, False, False, K, ROWS, SEGMENT, STEPS) * (1.0 / K)
    square = _row_sum(pointers, mean, True, CENTERED, K, ROWS, SEGMENT, STEPS) * (1.0 / K)
    if PTX:
        return mean, libdevice.rsqrt(square + eps)
    else:
        return mean, tl.div_rn(1.0, tl.sqrt_rn(square + eps))  # the interpreter has no library


@triton.jit
def _store_statistics(
    program,
    x,
    eps,
    mean,
    scale,
    M,
    stride,
    PTX: tl.constexpr,
    EPS_TENSOR: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`row_statistics` of the rows from program*ROWS on, to fp32 [M] each; centered if there is a place for means."""
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pointers = x + (tl.minimum(rows, M - 1) * stride)[:, None]
    CENTERED: tl.constexpr = mean is not None
    means, scales = row_statistics(pointers, eps, PTX, CENTERED, EPS_TENSOR, K, ROWS, SEGMENT, STEPS)
    if CENTERED:
        tl.store(mean + rows, means, mask=rows < M)
    tl.store(scale + rows, scales, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def row_statistics_kernel(
    x,
    eps,
    mean,
    scale,
    M,
    pitch,
    PTX: tl.constexpr,
    EPS_TENSOR: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K], rows `pitch` apart -> mean (None: not centered), scale fp32 [M]; grid (M/ROWS)."""
    start_next(PDL)
    wait_inputs(PDL)
    _store_statistics(tl.program_id(0), x, eps, mean, scale, M, pitch, PTX, EPS_TENSOR, K, ROWS, SEGMENT, STEPS)


@triton.jit
def _tile_rows(values, ROWS: tl.constexpr, R: tl.constexpr):
    """[ROWS] -> [R, 1], what is missing 0."""
    own = tl.arange(0, R)[:, None] == tl.arange(0, ROWS)[None, :]
    return tl.sum(tl.where(own, values[None, :], 0.0), axis=1)[:, None]


@triton.jit(do_not_specialize=["M", "lead"])
def norm_quantize_kernel(
    x,
    weight,
    bias,
    eps,
    mean,
    scale,
    counters,
    t,
    global_scale,
    codes,
    scales,
    M,
    lead,
    pitch,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    B: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
    EPS_TENSOR: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`transform_quantize_kernel` of the norm PROLOGUE of x. counters None: M <= ROWS, or ROWS = R*TILES; every program
    finds the statistics of its rows itself. Else int32 [bands], a band the R*TILES rows of a program: statistics go
    through mean (None: not centered) and scale, fp32 [M], ROWS rows a program; before any tile come `lead` programs of
    statistics, those of whole bands. Grid (M/ROWS statistics + bands * K/W tiles)."""
    wait_inputs(PDL)
    start_next(PDL)
    HEIGHT: tl.constexpr = R * TILES
    COLUMNS: tl.constexpr = (K + W - 1) // W
    stride = STRIDE if STRIDE > 0 else pitch
    program = tl.program_id(0)
    if counters is None:
        rows = (program // COLUMNS).to(tl.int64) * HEIGHT + tl.arange(0, ROWS)
        pointers = x + (tl.minimum(rows, M - 1) * stride)[:, None]
        CENTERED: tl.constexpr = PROLOGUE == "layer_norm"
        means, factors = row_statistics(pointers, eps, PTX, CENTERED, EPS_TENSOR, K, ROWS, SEGMENT, STEPS)
        quantize_rows(
            program,
            None,
            x,
            None,
            weight,
            bias,
            _tile_rows(means, ROWS, R),
            _tile_rows(factors, ROWS, R),
            t,
            global_scale,
            codes,
            scales,
            M,
            pitch,
            0,
            K,
            STRIDE,
            B,
            SHARED,
            FORMAT,
            RULE,
            SCALED,
            SWIZZLED,
            PROLOGUE,
            PTX,
            NATIVE,
            WIDE,
            R,
            W,
            TILES,
            STAGES,
            WORDS,
        )
    else:
        # First the statistics of some bands, then in turn those of a band and the tiles of an earlier one.
        SHARE: tl.constexpr = HEIGHT // ROWS
        total = tl.cdiv(M, ROWS)
        lead = tl.minimum(lead, total)
        turn = tl.maximum(program - lead, 0) // (SHARE + COLUMNS)
        place = tl.maximum(program - lead, 0) % (SHARE + COLUMNS)
        before = tl.minimum(lead + turn * SHARE + tl.minimum(place, SHARE), total)  # statistics with lower numbers
        if program < lead:
            before = program
        if (before < total) & (place < SHARE):
            _store_statistics(before, x, eps, mean, scale, M, stride, PTX, EPS_TENSOR, K, ROWS, SEGMENT, STEPS)
            arrive(counters + before // SHARE)
        else:
            tile = program - before
            band = tile // COLUMNS
            expected = tl.minimum(total - band * SHARE, SHARE)
            quantize_rows(
                tile,
                (counters + band, expected, COLUMNS),
                x,
                None,
                weight,
                bias,
                mean,
                scale,
                t,
                global_scale,
                codes,
                scales,
                M,
                pitch,
                0,
                K,
                STRIDE,
                B,
                SHARED,
                FORMAT,
                RULE,
                SCALED,
                SWIZZLED,
                PROLOGUE,
                PTX,
                NATIVE,
                WIDE,
                R,
                W,
                TILES,
                STAGES,
                WORDS,
            )


class Plan(NamedTuple):
    """`way`: as above; the tile that is quantized; rows a statistics program takes; for "ahead" how many programs lie
    at least between a row's statistics and its tiles."""

    way: str
    tile: Tile
    rows: int
    ahead: int = 0


FEW_ROWS = 4  # up to so many, every program computes the statistics itself
AHEAD = 2**22  # values of tiles between a row's statistics and its own, by their columns
MOST_BANDS = 2**14  # counters of a call


def choose_plan(rows: int, width: int, block: int) -> Plan:
    """The plan for x [rows, width] with transform blocks of `block` (0: none), from measurements with blocks of 32
    (docs/quantizer.md)."""
    tile = choose_tile(rows, width, block)
    if rows <= FEW_ROWS:
        own = min(triton.next_power_of_2(rows), tile.rows)
        columns = tile.columns if own == 1 else max(tile.columns, 64)
        return Plan("own", tile._replace(columns=columns, warps=max(tile.warps, own)), own)
    share = 1
    if rows > 64 and 0 < block <= 64:
        many = rows * width > 2**22
        tile = Tile(64, 64, 4, 3, 4) if many else Tile(64, 64, 2, 2, 4)
        share = 2 if many and width <= 4096 else 1
    if width > LOADS * 256:  # more than one warp can ask for at once
        tile = tile._replace(warps=max(tile.warps, 4))
    bands = triton.cdiv(rows, tile.rows * tile.tiles)
    return Plan("ahead" if bands <= MOST_BANDS else "apart", tile, share, max(AHEAD // width, 128))


def steps(width: int, rows: int, warps: int) -> int:
    """Segments of a row that a program of so many rows and warps asks for at once."""
    return max(1, min(LOADS * warps * 256 // (SEGMENT * rows), triton.cdiv(width, SEGMENT)))


def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | Tensor,
    norm: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` of a norm of x [.., K] bf16 or fp16. norm: "layer_norm", or "rms_" and a gain of
    `fused_ops.GAINS`; weight, bias [K] of x's dtype or None; eps a number or a tensor of one."""
    if x.numel() == 0:
        return transform_quantize(x, transform, global_scale, format, scale_rule)
    rows, width = dense_rows(x), x.shape[-1]
    count = rows.shape[0]
    plan = plan or choose_plan(count, width, 0 if transform is None else transform.shape[-1])
    tile, height = plan.tile, plan.tile.rows * plan.tile.tiles
    mean = scale = counters = None
    if plan.way != "own":
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(scale) if norm == "layer_norm" else None
    common = dict(
        mean=mean,
        scale=scale,
        eps=eps,
        EPS_TENSOR=isinstance(eps, Tensor),
        ROWS=plan.rows,
        SEGMENT=SEGMENT,
        STEPS=steps(width, plan.rows, tile.warps),
    )
    programs = triton.cdiv(count, plan.rows)
    if plan.way == "apart":
        pdl = x.is_cuda and overlaps(x.device.index)
        row_statistics_kernel[(programs,)](
            x=rows,
            M=count,
            pitch=rows.stride(0),
            K=width,
            PTX=assembly(x.device.index) if x.is_cuda else 0,
            PDL=pdl,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            **common,
            **({"launch_pdl": True} if pdl else {}),
        )
        prologue = Prologue(norm, weight=weight, bias=bias, mean=mean, scale=scale)
        return transform_quantize(x, transform, global_scale, format, scale_rule, tile, prologue=prologue)
    codes, scales, arguments = prepare(x, rows, transform, global_scale, format, scale_rule, tile)
    bands, columns, lead = triton.cdiv(count, height), triton.cdiv(width, tile.columns), 0
    grid = bands * columns
    if plan.way == "ahead":
        share = height // plan.rows
        lead = triton.cdiv(plan.ahead, share + columns) * share
        counters = workspace(x.device).counters(bands)
        grid += programs
    norm_quantize_kernel[(grid,)](
        weight=weight,
        bias=bias,
        counters=counters,
        lead=lead,
        PROLOGUE=norm,
        **common,
        **arguments,
    )
    return codes, scales
