"""What becomes of a warpgroup's sums in Hopper's product: units, partial sums of split-K, the epilogue (Gluon).

ROWS are the weight rows of a warpgroup, BLOCK_M the rows of x. A tile of 192 rows
of x comes here twice, as 128 and 64."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common import formats
from ..common.decode import E5M2_UNIT

e8m0_factor = gluon.jit(formats.e8m0_factor.fn)


@gluon.jit
def in_units(
    acc,
    first,
    row_m,
    w_top,
    x_unit,
    M,
    N: gl.constexpr,
    FORMAT: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    """The tensor core's sums times the units of their operands."""
    n = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout)), N - 1)
    m = gl.minimum(row_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc.type.layout)), M - 1)
    if w_top is not None:
        unit = e8m0_factor(gl.load(w_top + n).to(gl.int32))
        if FORMAT == "mxfp4":
            unit = unit * E5M2_UNIT
        acc = acc * unit[:, None]
    elif FORMAT == "nvfp4":
        acc = acc * 128.0  # each decoded weight is its value times 2^-7
    if x_unit is not None:
        acc = acc * gl.load(x_unit + m)[None, :]
    return acc


@gluon.jit
def _partial_offsets(ROWS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where a warpgroup's partial sums lie: [blocks, 128 threads, 4], each thread's four values side by side."""
    FOURS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    block = gl.arange(0, ROWS * BLOCK_M // 512, gl.SliceLayout(1, gl.SliceLayout(2, FOURS)))
    thread = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, FOURS)))
    four = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FOURS)))
    first = gl.expand_dims(gl.expand_dims(block, 1), 2) * 512 + gl.expand_dims(gl.expand_dims(thread, 0), 2) * 4
    return first + gl.expand_dims(gl.expand_dims(four, 0), 1)


@gluon.jit
def store_partial(partial, acc, ROWS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Stores acc fp32 [ROWS, BLOCK_M] in the order of `_partial_offsets`."""
    at = partial + _partial_offsets(ROWS, BLOCK_M)
    # The dimensions are bits of rows and columns as `mma_layout` spreads them over registers and threads. No value
    # moves.
    t = gl.permute(gl.reshape(acc, [ROWS // 64, 4, 2, 8, BLOCK_M // 8, 4, 2]), [0, 4, 1, 3, 5, 2, 6])
    t = gl.convert_layout(gl.reshape(t, [ROWS * BLOCK_M // 512, 128, 4]), at.type.layout, assert_trivial=True)
    gl.store(at, t, cache_modifier=".cg")


@gluon.jit
def load_partial(partial, stored, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, ACC: gl.constexpr):
    """What `store_partial` stored, or zeros if not `stored`: fp32 [ROWS, BLOCK_M] in layout ACC."""
    at = partial + _partial_offsets(ROWS, BLOCK_M)
    mask = gl.full([ROWS * BLOCK_M // 512, 128, 4], stored, gl.int1, at.type.layout)
    t = gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    t = gl.permute(gl.reshape(t, [ROWS // 64, BLOCK_M // 8, 4, 8, 4, 2, 2]), [0, 2, 5, 3, 1, 4, 6])
    return gl.convert_layout(gl.reshape(t, [ROWS, BLOCK_M]), ACC, assert_trivial=True)


@gluon.jit
def weight_scale(gw, y, first, N: gl.constexpr, ROWS: gl.constexpr):
    """`common.epilogue.weight_scale` of the rows of a warpgroup's tile y: a scalar, or fp32 [ROWS, 1]."""
    if gw.dtype.element_ty == gl.bfloat16:
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
        return gl.load(gw + n, mask=n < N, other=1.0).to(gl.float32)[:, None]
    else:
        return gl.load(gw)


@gluon.jit
def finish(y, first, row_m, extras, out, M, N: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, expert=None):
    """`common.epilogue.finish` of a warpgroup's tile, one row of x at a time. extras: (gx, gw, bias, residual); with an
    expert, gw is fp32 [E] and bias [E, N]."""
    gx, gw, bias, residual = extras
    if expert is not None:
        if gw is not None:
            gw += expert
        if bias is not None:
            bias += expert.to(gl.int64) * N
    if gx is not None and gw is not None:
        y = y * gl.div_rn(1.0, gl.load(gx) * weight_scale(gw, y, first, N, ROWS))
    elif gx is not None:
        y = y * gl.div_rn(1.0, gl.load(gx))
    elif gw is not None:
        y = y * gl.div_rn(1.0, weight_scale(gw, y, first, N, ROWS))
    if bias is not None:
        n = first + gl.arange(0, ROWS, gl.SliceLayout(1, y.type.layout))
        y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    # A thread holds 8 neighbours of a row of `out`.
    ROW_LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [ROWS // 64, 4 // (ROWS // 64)], [0, 1])
    r = gl.convert_layout(y.to(out.dtype.element_ty), ROW_LAYOUT)
    n = first + gl.arange(0, ROWS, gl.SliceLayout(1, ROW_LAYOUT))
    m = row_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, ROW_LAYOUT))
    mask = (m < M)[None, :] & (n < N)[:, None]
    tile = row_m.to(gl.int64) * N + first
    offset = (m - row_m)[None, :] * N + (n - first)[:, None]
    if residual is not None:
        added = gl.load(residual + tile + offset, mask=mask, other=0.0).to(gl.float32)
        r = (r.to(gl.float32) + added).to(out.dtype.element_ty)
    gl.store(out + tile + offset, r, mask=mask)
