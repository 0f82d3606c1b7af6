"""Which expert a row or a tile of rows belongs to, found on the device from the offsets of the experts' rows.

Tiles are numbered expert by expert. The rows behind the last offset, which belong to no expert, come last, with the
number of experts E as their expert.
Offsets may be anything: those that are not sorted or go past the rows give wrong experts, but no row outside [0, S)."""

import torch
import triton
import triton.language as tl

from ..common.overlap import start_next, wait_inputs


def most_tiles(rows, experts: int, block_m: int):
    """The largest number of tiles that any split of the rows over the experts, and over none, can need. rows: a number,
    or a symbol of a traced graph."""
    used = torch.sym_min(experts + 1, rows)
    return used + (rows - used) // block_m


@triton.jit
def _inside(v, S):
    return tl.minimum(tl.maximum(v, 0), S)


@triton.jit
def _tiles(offs, S, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Numbers of tiles up to and with each expert, int32 [EXPERTS]."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(offs + e, mask=e < E, other=0)
    start = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
    tl.device_assert((e >= E) | ((start >= 0) & (start <= end) & (end <= S)), "offsets are not sorted or past the rows")
    return tl.cumsum(tl.cdiv(tl.maximum(_inside(end, S) - _inside(start, S), 0), BLOCK_M), 0)


@triton.jit
def find_tiles(offs, slot, S, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of the slot-th tiles; slot and results int32 [SLOTS]. A slot beyond
    the last tile has a first row that is not below its end. EXPERTS: a power of two, at least E."""
    upto = _tiles(offs, S, E, EXPERTS, BLOCK_M)
    done = upto[None, :] <= slot[:, None]  # [SLOTS, EXPERTS]
    expert = tl.minimum(tl.sum(done.to(tl.int32), 1), E)
    before = tl.max(tl.where(done, upto[None, :], 0), 1)
    start = _inside(tl.load(offs + expert - 1, mask=expert > 0, other=0), S)
    end = _inside(tl.load(offs + expert, mask=expert < E, other=S), S)
    return expert, start + (slot - before) * BLOCK_M, end


@triton.jit
def find_tile(offs, slot, S, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """`find_tiles` of one slot, a scalar."""
    upto = _tiles(offs, S, E, EXPERTS, BLOCK_M)
    done = upto <= slot
    expert = tl.minimum(tl.sum(done.to(tl.int32), 0), E)
    before = tl.max(tl.where(done, upto, 0), 0)
    start = _inside(tl.load(offs + expert - 1, mask=expert > 0, other=0), S)
    end = _inside(tl.load(offs + expert, mask=expert < E, other=S), S)
    return expert, start + (slot - before) * BLOCK_M, end


@triton.jit
def find_expert(offs, row, E: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of one row, a scalar; E if it has none."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(offs + e, mask=e < E, other=2147483647)
    return tl.sum((end <= row).to(tl.int32), 0)


@triton.jit
def store_zeros(out, n, m, N, mask):
    """Zeros for the rows m and the columns n of out [.., N]."""
    zero = tl.zeros(mask.shape, tl.float32).to(out.dtype.element_ty)
    tl.store(out + m.to(tl.int64) * N + n, zero, mask=mask)


@triton.jit(do_not_specialize=["S", "slots"])
def tile_table_kernel(
    offs,
    table,
    out,
    S,
    slots,
    N: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """table int32 [slots, 4]: expert, first row, end; the expert is -1 where there is no further tile. Rows of no
    expert get zeros in `out` [S, N]. Grid (tiles of slots)."""
    wait_inputs(PDL)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    expert, first, end = find_tiles(offs, slot, S, E, EXPERTS, BLOCK_M)
    expert = tl.where((expert < E) & (first < end), expert, -1)
    tl.store(table + slot * 4, expert, mask=slot < slots)
    tl.store(table + slot * 4 + 1, first, mask=slot < slots)
    tl.store(table + slot * 4 + 2, end, mask=slot < slots)
    column = tl.arange(0, 1024)
    routed = tl.minimum(tl.maximum(tl.load(offs + E - 1), 0), S)
    for m in tl.range(routed + tl.program_id(0), S, tl.num_programs(0)):
        for n in tl.range(0, N, 1024):
            tl.store(out + tl.cast(m, tl.int64) * N + n + column, 0.0, mask=n + column < N)
    start_next(PDL)
