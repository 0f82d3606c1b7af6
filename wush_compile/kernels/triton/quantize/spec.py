"""`Spec`: everything a quantizer kernel is compiled for, as one compile-time constant.

Triton compares, hashes and prints a `Spec` by the values of its fields, so each `Spec` gets a kernel of its own, in
memory and in the cache on disk. It has fields alone, because the cache does not see the source of a method or a
property. A kernel puts a field into a `tl.constexpr` variable before it passes it on as a string or in a tuple: Triton
3.6 demands it.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....formats import ACTIVATION_FORMATS, FORMATS
from .tiles import Tile


class Spec(NamedTuple):
    width: int  # channels of a row (K)
    stride: int  # values from one row of x to the next; 0: the argument `pitch` of the kernel
    group: int  # channels that share a scale (G)
    block: int  # channels of a transform block (B); 0: no transform
    shared: bool  # one matrix serves all blocks
    feeds_back: bool  # rounds with feedback
    format: str  # mxfp4 or nvfp4; fp8 or none in tokens.py
    rule: str  # scale rule of the format
    scaled: bool  # there is a global scale
    swizzled: bool  # scales are written as `layouts.swizzle_scales` orders them
    prologue: str | None  # what is done to x first, by its name in `prologue.py`
    limit: float  # of `swiglu_oai`, for which x has two values a channel, gate and up; else 0
    sm: int  # newest instruction set in use, as `tiles.instructions`: 80, 86 or 100; 0: no assembly
    fp32_dot: bool  # the transform multiplies in fp32
    rows: int  # of a tile (R)
    columns: int  # of a tile (W)
    tiles: int  # row tiles that a program walks
    load_stages: int  # depth of the load pipeline over these tiles
    words: int  # 4-byte words of codes that a thread stores at once; 0: Triton stores the codes
    pdl: bool  # programmatic dependent launch, see `common/overlap.py`


def make_spec(
    rows: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    rule: str,
    tile: Tile,
    sm: int,
    *,
    prologue: str | None = None,
    limit: float = 0.0,
    swizzled: bool = False,
    pdl: bool = False,
    feeds_back: bool = False,
) -> Spec:
    """The `Spec` for rows [M, K], or [M, 2K] with a limit, transform [K/B or 1, B, B] or None; `words` is 0."""
    width = rows.shape[1] // (2 if limit else 1)
    block = 0 if transform is None else transform.shape[-1]
    other_dtype = transform is not None and transform.dtype != rows.dtype
    return Spec(
        width=width,
        stride=rows.shape[1] if rows.stride(0) == rows.shape[1] else 0,
        group=(ACTIVATION_FORMATS.get(format) or FORMATS[format]).group_size,
        block=block,
        shared=block > 0 and transform.shape[0] == 1 and width > block,
        feeds_back=feeds_back,
        format=format,
        rule=rule,
        scaled=global_scale is not None,
        swizzled=swizzled,
        prologue=prologue,
        limit=limit,
        sm=sm,
        # In the interpreter too, whose bf16 dot is wrong.
        fp32_dot=sm == 0 or rows.dtype == torch.float32 or other_dtype,
        rows=tile.rows,
        columns=tile.columns,
        tiles=tile.tiles,
        load_stages=tile.stages,
        words=0,
        pdl=pdl,
    )


@triton.constexpr_function
def gather_spec(*fields):
    """The fields of a `Spec`, one by one, as a `Spec`. The import is inside, because a package compiles the source of
    this function alone, without the names around it."""
    from wush_compile.kernels.triton.quantize.spec import Spec

    return Spec(*fields)
