"""The tiles of x that are quantized: loaded, with the prologue applied."""

import triton
import triton.language as tl

from .prologue import activated, gated, normed, swiglu_oai


@triton.jit
def prefetch(pointers, SM: tl.constexpr):
    """Asks for the cache lines that hold these addresses; reads nothing."""
    if SM > 0:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def inside_mask(rows, left, columns, K: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Which elements of a tile exist, None if all do: rows [R, 1] below `left` if MASKED, columns [1, C] below K unless
    EVEN."""
    inside = None
    if MASKED:
        inside = rows < left
    if not EVEN:
        inside = columns < K if inside is None else inside & (columns < K)
    return inside


@triton.jit
def load_rows(
    x, row, left, stride, first, SPEC: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr, OTHER: tl.constexpr = 0.0
):
    """[R, W]: rows from `row` and channels from `first` on, of what x points to; OTHER for elements that do not exist.
    [R, 2W] if x has two values a channel.
    Gates take 1 for OTHER, because the division in SiLU has a slow path for zeros."""
    EACH: tl.constexpr = 2 if SPEC.limit > 0 else 1
    rows = row + tl.arange(0, SPEC.rows)[:, None]
    columns = tl.arange(0, EACH * SPEC.columns)[None, :]
    inside = inside_mask(rows, left, EACH * first + columns, EACH * SPEC.width, MASKED, EVEN)
    pointers = x + (rows * stride + columns)
    return tl.load(pointers, mask=inside, other=None if inside is None else OTHER)


@triton.jit
def apply_prologue(tile, source, row, left, first, SPEC: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """What the prologue makes of a tile of x and of its other operands. `kept` gets the norm, or its sum with `up`."""
    x, up, weight, bias, mean, scale, kept, stride, up_stride = source
    PROLOGUE: tl.constexpr = SPEC.prologue
    if PROLOGUE is not None:
        if PROLOGUE == "swiglu_oai":
            tile = swiglu_oai(tile, SPEC.limit, SPEC.rows, SPEC.columns)
        elif up is not None and scale is None:
            tile = gated(tile, load_rows(up, row, left, up_stride, first, SPEC, MASKED, EVEN), PROLOGUE, SPEC.sm)
        elif scale is None:
            tile = activated(tile, PROLOGUE, SPEC.sm)
        else:
            rows = row + tl.arange(0, SPEC.rows)[:, None]
            inside = inside_mask(rows, left, 0, SPEC.width, MASKED, True)
            if mean is not None:
                if mean.dtype.is_ptr():
                    mean = tl.load(mean + rows, mask=inside, other=None if inside is None else 0.0)
            if scale.dtype.is_ptr():
                scale = tl.load(scale + rows, mask=inside, other=None if inside is None else 0.0)
            wide = tile.to(tl.float32)
            if up is not None:
                wide += load_rows(up, row, left, up_stride, first, SPEC, MASKED, EVEN).to(tl.float32)
            result = normed(wide, mean, scale, weight, bias, PROLOGUE, tile.dtype)
            if kept is not None:
                columns = tl.arange(0, SPEC.columns)[None, :]
                inside = inside_mask(rows, left, first + columns, SPEC.width, MASKED, EVEN)
                tl.store(
                    kept + (rows * SPEC.width + columns), result if up is None else wide.to(tile.dtype), mask=inside
                )
            tile = result
    return tile


@triton.jit
def load_tile(source, row, left, first, SPEC: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """The tile that is transformed and quantized: of x, or what the prologue makes of it."""
    OTHER: tl.constexpr = 0.0 if source[1] is None else 1.0
    tile = load_rows(source[0], row, left, source[7], first, SPEC, MASKED, EVEN, OTHER)
    return apply_prologue(tile, source, row, left, first, SPEC, MASKED, EVEN)
