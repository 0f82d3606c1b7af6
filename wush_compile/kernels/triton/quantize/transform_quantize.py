"""Block transform, quantization and packing in one Triton kernel (docs/spec.md §2, §4, §6).

A program owns W columns and walks row tiles. The matrices of the W/B blocks form one block-diagonal [W, W] operand of a
single matrix product. The arithmetic on the zeros is free, because the kernel is bound by memory; the loads stay wide,
and the operand stays on the chip from tile to tile.

    spec.py     what a kernel is compiled for        tiles.py       tiles by shape, instructions by device
    load.py     tiles of x                           prologue.py    what may happen to x first
    dot.py      the transform                        norm.py        a norm as prologue, in one launch
    feedback.py rounding with feedback
    codes.py    packing                              statistics.py  the sums that a norm needs
    store.py    codes and scales to memory           fused.py       the fused ops
    rows.py     one program: the loop over tiles
    tokens.py   activations of 8 and 16 bits
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import FORMATS
from ....ops.layouts import swizzled_shape
from ...facts import mark_used_and_were_settled
from ..common.overlap import overlaps, start_next, wait_inputs
from .prologue import Prologue
from .rows import load_weights, quantize_rows
from .spec import gather_spec, make_spec
from .tiles import MOST_ROWS, Tile, choose_tile, device_instructions, words


@triton.jit(do_not_specialize=["M", "late"])
def transform_quantize_kernel(
    x,
    up,
    weight,
    bias,
    mean,
    scale,
    kept,
    t,
    feedback,
    global_scale,
    codes,
    scales,
    M,
    pitch,
    up_pitch,
    late,
    SPEC: tl.constexpr,
):
    """x [M, K], its rows `pitch` apart, t [K/B or 1, B, B] -> codes uint8 [M, K/2], scales uint8 [M, K/G].

    A program takes W columns and R*TILES rows; neighbours take the next columns. `up` [M, K], its rows `up_pitch`
    apart, and the vectors of a norm belong to the prologue, and are None where the prologue has none. kept [M, K], if
    there is one, is written: the norm in x's dtype. late: 1 where the kernel in front may have written t, feedback or
    the global scale, else 0: then they are read before it has ended."""
    if late:
        wait_inputs(SPEC.pdl)
    weights = load_weights(tl.program_id(0), t, feedback, global_scale, SPEC)
    wait_inputs(SPEC.pdl)
    start_next(SPEC.pdl)
    quantize_rows(
        tl.program_id(0),
        weights,
        None,
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


@triton.jit(do_not_specialize=["M", "late"])
def flat_transform_quantize_kernel(
    x,
    t,
    feedback,
    global_scale,
    codes,
    scales,
    M,
    pitch,
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
    """`transform_quantize_kernel` without a prologue, the fields of its `Spec` one by one: the form for packaged
    programs, since a launch in a graph holds numbers and strings, not a `Spec`."""
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
    transform_quantize_kernel(
        x, None, None, None, None, None, None, t, feedback, global_scale, codes, scales, M, pitch, 0, 1, SPEC
    )


def dense_rows(x: Tensor) -> Tensor:
    """x [.., K] as rows [M, K] whose elements are next to each other, a view if possible."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1 or rows.stride(0) * MOST_ROWS >= 2**31:
        rows = rows.contiguous()
    return rows


def prepare(
    x: Tensor,
    rows: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    tile: Tile,
    prologue: str | None,
    swizzled: bool = False,
    limit: float = 0.0,
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor, dict]:
    """(codes, scales) to be written for x, and the arguments, by name, that every kernel with `quantize_rows` takes;
    rows = dense_rows(x), of 2K columns with a limit."""
    count, width = rows.shape[0], rows.shape[1] // (2 if limit else 1)
    groups = width // FORMATS[format].group_size
    codes = torch.empty((*x.shape[:-1], width // 2), dtype=torch.uint8, device=x.device)
    shape = swizzled_shape(count, groups) if swizzled else (*x.shape[:-1], groups)
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    sm = device_instructions(x.device.index) if x.is_cuda else 0
    pdl = x.is_cuda and overlaps(x.device.index)
    given = dict(prologue=prologue, limit=limit, swizzled=swizzled, pdl=pdl, feeds_back=feedback is not None)
    spec = make_spec(rows, transform, global_scale, format, scale_rule, tile, sm, **given)
    transform, feedback = (w if w is None else w.contiguous() for w in (transform, feedback))
    read = transform, feedback, global_scale
    if sm > 0:
        spec = spec._replace(words=words(tile, spec.fp32_dot, spec.block, width))
    return (
        codes,
        scales,
        dict(
            x=rows,
            t=transform,
            feedback=feedback,
            global_scale=global_scale,
            codes=codes,
            scales=scales,
            M=count,
            pitch=rows.stride(0),
            late=int(not (pdl and mark_used_and_were_settled(*(w for w in read if w is not None)))),
            SPEC=spec,
            num_warps=tile.warps,
            enable_fp_fusion=False,
            **({"launch_pdl": True} if pdl else {}),
        ),
    )


def transform_quantize(
    x: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    tile: Tile | None = None,
    swizzled: bool = False,
    prologue: Prologue = Prologue(),
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for mxfp4 and nvfp4 (docs/spec.md §6).

    x [.., K] bf16, fp16 or fp32; transform [K/B or 1, B, B] or None -> codes uint8 [.., K/2], scales uint8 [.., K/G].
    swizzled: the scales of all rows are in the order of `layouts.swizzle_scales`, padding written. With
    `prologue.limit` x is [.., 2K]."""
    rows = dense_rows(x)
    count, width = rows.shape[0], rows.shape[1] // (2 if prologue.limit else 1)
    if tile is None:
        tile = choose_tile(count, width, 0 if transform is None else transform.shape[-1], feedback is not None)
        if prologue.up is not None:  # twice the bytes of a stage: more programs fit with fewer stages
            tile = tile._replace(stages=min(tile.stages, 3))
    codes, scales, arguments = prepare(
        x, rows, transform, global_scale, format, scale_rule, tile, prologue.name, swizzled, prologue.limit, feedback
    )
    if scales.numel() == 0:
        return codes, scales
    up = None if prologue.up is None else dense_rows(prologue.up)
    unit = 4 * FORMATS[format].group_size
    covered = (-(-width // unit) * unit, -(-count // 128) * 128) if swizzled else (width, count)
    grid = (triton.cdiv(covered[0], tile.columns) * triton.cdiv(covered[1], tile.rows * tile.tiles),)
    transform_quantize_kernel[grid](
        up=up,
        weight=prologue.weight,
        bias=prologue.bias,
        mean=prologue.mean,
        scale=prologue.scale,
        kept=prologue.kept,
        up_pitch=0 if up is None else up.stride(0),
        **arguments,
    )
    return codes, scales
