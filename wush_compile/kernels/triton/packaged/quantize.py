"""`wush::transform_quantize` as launches in a graph."""

import torch
import triton
from torch import Tensor

from ....formats import ACTIVATION_FORMATS, FORMATS, operand_layout
from ..quantize.spec import make_spec
from ..quantize.tiles import choose_tile, instructions
from ..quantize.tokens import ENOUGH_PROGRAMS, choose_tokens, flat_token_kernel
from ..quantize.transform_quantize import dense_rows, flat_transform_quantize_kernel
from .launches import Known, bands, in_band, launch, tiles

# Most rows of the bands, beside those where `tiles.choose_tile` takes a larger tile because of rows times width.
ROWS = (4, 16, 64)
SIZES = (2**20, 2**22)


def _limits(width: int) -> tuple[int, ...]:
    return tuple(sorted({*ROWS, *(max(size // width, 1) for size in SIZES)}))


def transform_quantize(
    known: Known,
    x: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for a device of that compute capability, with scales in rows."""
    rows, lead, width = dense_rows(x), x.shape[:-1], x.shape[-1]
    t, f = (None if tensor is None else tensor.contiguous() for tensor in (transform, feedback))
    make = _tokens if format in ACTIVATION_FORMATS else _codes
    codes, scales = make(rows, t, f, global_scale, format, scale_rule, known, _limits(width))
    return codes.view(*lead, codes.shape[-1]), scales.view(*lead, scales.shape[-1])


def _codes(x, t, f, global_scale, format, rule, known, limits) -> tuple[Tensor, Tensor]:
    """Codes uint8 [M, K/2] and scales uint8 [M, K/G] of x [M, K]."""
    m, width = x.shape
    codes = x.new_empty((m, width // 2), dtype=torch.uint8)
    scales = x.new_empty((m, width // FORMATS[format].group_size), dtype=torch.uint8)
    block = 0 if t is None else t.shape[-1]
    for first, last, tile in bands(m, lambda most: choose_tile(most, width, block, f is not None), limits):
        grid = (tiles(width, tile.columns) * in_band(m, first, last) * tiles(m, tile.rows * tile.tiles),)
        how = dict(feeds_back=f is not None)
        spec = make_spec(x, t, global_scale, format, rule, tile, instructions(known.capability), **how)
        operands = dict(x=x, t=t, feedback=f, global_scale=global_scale)
        given = dict(**operands, codes=codes, scales=scales, M=m, pitch=x.stride(0), **spec._asdict())
        written = launch(flat_transform_quantize_kernel, ("codes", "scales"), grid, tile.warps, **given)
        codes, scales = written["codes"], written["scales"]
    return codes, scales


def _tokens(x, t, f, global_scale, format, rule, known, limits) -> tuple[Tensor, Tensor]:
    """e4m3 bytes [M, K] and scales fp32 [M, 1], or x's dtype [M, K] and fp32 [M, 0]."""
    (m, width), fp8 = x.shape, format == "fp8"
    columns, dtype, groups, scale_dtype = operand_layout(format, width, x.dtype)
    codes, scales = x.new_empty((m, columns), dtype=dtype), x.new_empty((m, groups), dtype=scale_dtype)
    block = 0 if t is None else t.shape[-1]
    programs = tuple(
        ENOUGH_PROGRAMS * known.multiprocessors * 2**i * 64 * 64 // (2 * width) for i in (1, 2, 3)
    )  # more tiles a program
    limits = tuple(sorted({*limits, *programs})) if fp8 and block else limits
    chosen = bands(m, lambda most: choose_tokens(most, width, block, format, known.multiprocessors), limits)
    # One for each tile of rows, and zero again when a kernel ends. So it is not an output, and all quantizers of a
    # program can share it. Its size is M: PyTorch would guard on a number of tiles that is 1 for the example's rows.
    counters = torch.zeros(m, dtype=torch.int32, device=x.device) if fp8 else None
    for first, last, (tile, several) in chosen:
        parts = triton.cdiv(triton.cdiv(width, tile.columns), several)
        spec = make_spec(x, t, global_scale, format, rule, tile, instructions(known.capability))
        written = launch(
            flat_token_kernel,
            ("codes", "scales", "maxima") if fp8 else ("codes",),
            (in_band(m, first, last) * tiles(m, tile.rows) * parts * (2 if fp8 else 1),),
            tile.warps,
            x=x,
            t=t,
            feedback=None,
            global_scale=global_scale,
            codes=codes,
            scales=scales if fp8 else None,
            maxima=x.new_empty((m, parts), dtype=torch.int32) if fp8 else None,
            counters=counters,
            M=m,
            pitch=x.stride(0),
            TILES=several,
            **spec._asdict(),
        )
        codes, scales = written["codes"], written["scales"] if fp8 else scales
    return codes, scales
