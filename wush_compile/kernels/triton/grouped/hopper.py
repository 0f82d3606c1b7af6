"""Experts' products on Hopper: `linear.hopper` with tiles taken from a table (Gluon).

A small kernel (`find.tile_table_kernel`) first writes the table of tiles. The programs then take tiles of the result in
turn, as in `linear.hopper`: one warp copies, two warpgroups decode and multiply. A tile of x may end in the next
expert's rows, and a tile of weights in the next expert's weights; neither is stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..linear.hopper import (
    REGISTERS_TO_COPY,
    STEP_K,
    STEP_WORDS,
    async_load,
    consume_item,
    start_next,
    wait_inputs,
)


@gluon.jit
def _tile(table, pid, TILES_N: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of the pid-th tile of the result: (expert, first weight row, first row of x, end of the expert's rows)."""
    entry = table + pid // TILES_N * 4
    return gl.load(entry), pid % TILES_N * BLOCK_N, gl.load(entry + 1), gl.load(entry + 2)


@gluon.jit
def _prefetch(pointer, first, count, LINES: gl.constexpr):
    """Asks for `LINES` lines of 128 bytes at pointer + first in L2, of a tensor of `count` bytes (int64)."""
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for i in gl.static_range((LINES + 31) // 32):
        at = pointer.to(gl.int64) + gl.minimum(first + (i * 32 + lane) * 128, count - 1)
        gl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def _produce(
    read,
    N: gl.constexpr,
    K: gl.constexpr,
    E: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp. It also asks for the scales of each tile in L2: the other warps read them some steps later, and
    do not wait for memory then. read: (w, w_scales, w_top, x, buffers, table, tiles); buffers as in `linear.hopper`."""
    w, w_scales, w_top, x, buffers, table, tiles = read
    w_tiles, x_tiles, x_extra_tiles, full, empty = buffers
    STEPS: gl.constexpr = (K + STEP_K - 1) // STEP_K
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    X_BYTES: gl.constexpr = 1 if FORMAT == "mxfp4" else 2
    STEP_BYTES: gl.constexpr = BLOCK_N * STEP_WORDS * 4 + BLOCK_M * STEP_K * X_BYTES
    GROUPS: gl.constexpr = K // (16 if FORMAT == "nvfp4" else 32)
    step = 0
    expert, row_n, first, end = _tile(table, gl.program_id(0), TILES_N, BLOCK_N)
    for pid in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row = expert * N + row_n
        if expert >= 0:
            _prefetch(w_scales, row.to(gl.int64) * GROUPS, gl.to_tensor(E * N).to(gl.int64) * GROUPS, GROUPS)
            if w_top is not None:
                _prefetch(w_top, row.to(gl.int64), gl.to_tensor(E * N).to(gl.int64), 1)
            for i in range(STEPS):
                stage = step % STAGES
                if step >= STAGES:
                    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), STEP_BYTES)
                async_load(w, [row, i * STEP_WORDS], full.index(stage), w_tiles.index(stage))
                async_load(x, [first, i * STEP_K], full.index(stage), x_tiles.index(stage))
                step += 1
        ahead = gl.minimum(pid + gl.num_programs(0), tiles - 1)
        expert, row_n, first, end = _tile(table, ahead, TILES_N, BLOCK_N)


@gluon.jit
def _consume(
    use,
    WARPGROUP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One of the two warpgroups that multiply. use: (buffers, operands, table, tiles), the first two as in
    `linear.hopper`."""
    buffers, operands, table, tiles = use
    STEPS: gl.constexpr = (K + STEP_K - 1) // STEP_K
    TILES_N: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    before = 0
    next_expert, next_n, next_first, next_end = _tile(table, gl.program_id(0), TILES_N, BLOCK_N)
    for pid in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, row_n, first, end = next_expert, next_n, next_first, next_end
        # The next entry arrives while this tile is computed.
        ahead = gl.minimum(pid + gl.num_programs(0), tiles - 1)
        next_expert, next_n, next_first, next_end = _tile(table, ahead, TILES_N, BLOCK_N)
        if expert >= 0:
            item = (row_n, first, 0, STEPS, -1)
            before = consume_item(
                buffers, operands, item, end, before, WARPGROUP, N, K, FORMAT, BLOCK_N, BLOCK_M, 0, STAGES, 2, expert
            )


@gluon.jit(do_not_specialize=["tiles"])
def grouped_hopper_kernel(
    x,
    x_unit,
    gx,
    w,
    w_scales,
    w_top,
    gw,
    bias,
    table,
    out,
    tiles,
    N: gl.constexpr,
    K: gl.constexpr,
    E: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    residual=None,
    partials=None,
):
    """out [S, N], its rows of experts.

    Tensor descriptors: w int32 [E*N, K/8] in tiles [BLOCK_N, 16]; x [S, K rounded up to a multiple of 128] in tiles
    [BLOCK_M, 128], in lane order: e5m2 or e4m3 where FORMAT is mxfp4, bf16 where it is mxfp4_bf16 or nvfp4.
    w_scales: uint8 [E, N, K/G]. MXFP4: w_top uint8 [E, N]. gw: fp32 [E]. bias: [E, N]. x_unit: fp32 [S], or None.
    table: int32 [slots, 4], of `find.tile_table_kernel`. tiles: slots times tiles of N; program i takes the tiles i,
    i + programs, ... REGISTERS: of a thread of the second warpgroup. residual, partials: what there is not.

    Launched with 4 warps, which are the first of the 2 warpgroups that multiply."""
    wait_inputs(True)
    w_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, STEP_WORDS], w.layout)
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, STEP_K], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    buffers = (w_tiles, x_tiles, x_tiles, full, empty)
    operands = (w_scales, w_top, x_unit, (gx, gw, bias, residual), out, partials, partials)
    use = (buffers, operands, table, tiles)
    gl.warp_specialize(
        [
            (_consume, (use, 0, N, K, FORMAT, BLOCK_N, BLOCK_M, STAGES)),
            (_consume, (use, 1, N, K, FORMAT, BLOCK_N, BLOCK_M, STAGES)),
            (_produce, ((w, w_scales, w_top, x, buffers, table, tiles), N, K, E, FORMAT, BLOCK_N, BLOCK_M, STAGES)),
        ],
        [4, 1],
        [REGISTERS, REGISTERS_TO_COPY],
    )
    start_next(True)
