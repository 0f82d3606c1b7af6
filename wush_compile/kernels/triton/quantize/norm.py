"""A norm in front of the quantizer, in one launch.

A norm needs a statistic of every row before the row's first value can be quantized. There are three ways. They give the
same bits, because each adds up in the same order (`statistics.py`):

    own     Few rows: every program computes the statistics of its own rows. L2 serves these rows to all programs.
    ahead   One grid with programs of two kinds: some compute the statistics of whole rows, some quantize tiles of rows
            that were read a little earlier and are still in L2. So x comes from memory once.
    apart   A kernel for the statistics, then one that quantizes: x comes from memory twice.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.memory import workspace
from ..common.overlap import arrive, overlaps, start_next, wait_inputs
from .prologue import Prologue
from .rows import load_weights, quantize_rows
from .statistics import LOADS, Sums, row_statistics, row_statistics_kernel, steps, store_statistics
from .tiles import Tile, choose_tile, device_instructions
from .transform_quantize import dense_rows, prepare, transform_quantize


@triton.jit
def tile_rows(values, ROWS: tl.constexpr, R: tl.constexpr):
    """[ROWS] -> [R, 1], with 0 for rows that are missing."""
    own = tl.arange(0, R)[:, None] == tl.arange(0, ROWS)[None, :]
    return tl.sum(tl.where(own, values[None, :], 0.0), axis=1)[:, None]


@triton.jit(do_not_specialize=["M", "lead", "late"])
def norm_quantize_kernel(
    x,
    up,
    weight,
    bias,
    eps,
    mean,
    scale,
    kept,
    counters,
    t,
    feedback,
    global_scale,
    codes,
    scales,
    M,
    lead,
    pitch,
    up_pitch,
    late,
    SPEC: tl.constexpr,
    SUMS: tl.constexpr,
):
    """`transform_quantize_kernel` of a norm of x, or of x + up, the prologue of SPEC; kept [M, K], if there is one, is
    that norm, or that sum.

    counters None: every program computes the statistics of its rows itself; SUMS.rows is at least M, or R*TILES.
    Else counters is int32 [bands], all 0; a band is the R*TILES rows of a program. Statistics go through mean (None:
    not centered) and scale, fp32 [M], SUMS.rows rows a program. `lead` programs of statistics, those of whole bands,
    come before any tile. Grid (M/SUMS.rows statistics + bands * K/W tiles)."""
    program = tl.program_id(0)
    weights = (0.0, (0.0, 0.0, 0.0), 0.0)
    if late:
        wait_inputs(SPEC.pdl)
    if counters is None:
        weights = load_weights(program, t, feedback, global_scale, SPEC)
    wait_inputs(SPEC.pdl)
    start_next(SPEC.pdl)
    ROWS: tl.constexpr = SUMS.rows
    HEIGHT: tl.constexpr = SPEC.rows * SPEC.tiles
    COLUMNS: tl.constexpr = (SPEC.width + SPEC.columns - 1) // SPEC.columns
    stride = SPEC.stride if SPEC.stride > 0 else pitch
    if counters is None:
        rows = (program // COLUMNS).to(tl.int64) * HEIGHT + tl.arange(0, ROWS)
        rows = tl.minimum(rows, M - 1)
        others = None
        if up is not None:
            others = up + (rows * up_pitch)[:, None]
        means, factors = row_statistics(x + (rows * stride)[:, None], others, eps, SUMS)
        means = tile_rows(means, ROWS, SPEC.rows)
        factors = tile_rows(factors, ROWS, SPEC.rows)
        quantize_rows(
            program,
            weights,
            None,
            x,
            up,
            weight,
            bias,
            means,
            factors,
            kept,
            codes,
            scales,
            M,
            pitch,
            up_pitch,
            SPEC,
        )
    else:
        # First the statistics of some bands, then, in turn, those of one band and the tiles of an earlier one.
        SHARE: tl.constexpr = HEIGHT // ROWS
        total = tl.cdiv(M, ROWS)
        lead = tl.minimum(lead, total)
        turn = tl.maximum(program - lead, 0) // (SHARE + COLUMNS)
        place = tl.maximum(program - lead, 0) % (SHARE + COLUMNS)
        before = tl.minimum(lead + turn * SHARE + tl.minimum(place, SHARE), total)  # statistics with lower numbers
        if program < lead:
            before = program
        if (before < total) & (place < SHARE):
            store_statistics(before, x, up, eps, mean, scale, M, stride, up_pitch, SUMS)
            arrive(counters + before // SHARE)
        else:
            tile = program - before
            band = tile // COLUMNS
            expected = tl.minimum(total - band * SHARE, SHARE)
            quantize_rows(
                tile,
                load_weights(tile, t, feedback, global_scale, SPEC),
                (counters + band, expected, COLUMNS),
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
                SPEC,
            )


class NormPlan(NamedTuple):
    way: str  # own, ahead or apart
    tile: Tile  # that is quantized
    rows: int  # that a statistics program takes
    ahead: int = 0  # way "ahead": least number of programs between a row's statistics and its tiles


FEW_ROWS = 4  # up to so many, every program computes the statistics itself
# Way "ahead": distance, in values, between computing a row's statistics and quantizing that row, long enough that they
# are ready.
VALUES_AHEAD = 2**22
MOST_BANDS = 2**14  # counters of a call


def choose_plan(rows: int, width: int, block: int, feeds_back: bool = False) -> NormPlan:
    """The plan for x [rows, width] with transform blocks of `block` channels (0: no transform).

    The thresholds come from `python benchmarks/speed_quantize_kernel.py tune-norm` on one H100, with blocks of 32; its
    output was not kept. docs/notebook/quantize_kernel.md has the times of the plans in use."""
    tile = choose_tile(rows, width, block, feeds_back)
    if rows <= FEW_ROWS:
        own = min(triton.next_power_of_2(rows), tile.rows)
        columns = tile.columns if own == 1 else max(tile.columns, 64)
        return NormPlan("own", tile._replace(columns=columns, warps=max(tile.warps, own)), own)
    share = 1
    if rows > 64 and 0 < block <= 64:
        many = rows * width > 2**22
        tile = Tile(64, 64, 4, 3, 4) if many else Tile(64, 64, 2, 2, 4)
        share = 2 if many and width <= 4096 else 1
    if width > LOADS * 256:  # more than one warp can ask for at once
        tile = tile._replace(warps=max(tile.warps, 4))
    bands = triton.cdiv(rows, tile.rows * tile.tiles)
    way = "ahead" if bands <= MOST_BANDS else "apart"
    return NormPlan(way, tile, share, max(VALUES_AHEAD // width, 128))


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
    plan: NormPlan | None = None,
    kept: Tensor | None = None,
    up: Tensor | None = None,
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` of a norm of x [.., K] bf16 or fp16, or of x + up in fp32.

    norm: "layer_norm", or "rms_" and a gain of `ops.fused.GAINS`; weight, bias [K] of x's dtype or None; eps a number
    or a tensor of one. The norm itself, or the sum x + up, is written to `kept`, dense and like x, if there is
    one."""
    if x.numel() == 0:
        return transform_quantize(x, transform, global_scale, format, scale_rule, feedback=feedback)
    rows, width = dense_rows(x), x.shape[-1]
    count = rows.shape[0]
    plan = plan or choose_plan(count, width, 0 if transform is None else transform.shape[-1], feedback is not None)
    tile, height = plan.tile, plan.tile.rows * plan.tile.tiles
    mean = scale = counters = None
    if plan.way != "own":
        scale = torch.empty(count, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(scale) if norm == "layer_norm" else None
    sums = Sums(
        width=width,
        rows=plan.rows,
        steps=steps(width, plan.rows, tile.warps),
        centered=norm == "layer_norm",
        eps_tensor=isinstance(eps, Tensor),
        sm=device_instructions(x.device.index) if x.is_cuda else 0,
    )
    programs = triton.cdiv(count, plan.rows)
    others = None if up is None else dense_rows(up)
    addend = dict(up=others, up_pitch=0 if others is None else others.stride(0))
    if plan.way == "apart":
        pdl = x.is_cuda and overlaps(x.device.index)
        row_statistics_kernel[(programs,)](
            x=rows,
            eps=eps,
            mean=mean,
            scale=scale,
            M=count,
            pitch=rows.stride(0),
            **addend,
            SUMS=sums,
            PDL=pdl,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if pdl else {}),
        )
        prologue = Prologue(norm, up, weight=weight, bias=bias, mean=mean, scale=scale, kept=kept)
        return transform_quantize(
            x, transform, global_scale, format, scale_rule, tile, prologue=prologue, feedback=feedback
        )
    codes, scales, arguments = prepare(
        x, rows, transform, global_scale, format, scale_rule, tile, norm, feedback=feedback
    )
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
        eps=eps,
        mean=mean,
        scale=scale,
        kept=kept,
        counters=counters,
        lead=lead,
        SUMS=sums,
        **addend,
        **arguments,
    )
    return codes, scales
