"""The product of many rows on Hopper: weights decoded in registers, everything else moved by the copy engine (Gluon).

One warp copies tiles of packed weights and of x by the bulk copy engine (TMA), several steps ahead. Two or four
warpgroups decode their weight rows straight into the left operand of `wgmma`; each decodes while the tensor cores work
for another. Gluon states which warps do what. Triton's own pipeline of the same product (`gemm.py`) does not: there
copying, decoding and multiplying wait for each other.

Operands, arithmetic and results are those of `gemm.fused_gemm_kernel` with x upcast. The work is cut into work items: a
tile of `out`, or one of the `split_k` parts of a tile of the last, incomplete wave. hopper_decode.py has the register
layouts, hopper_output.py what happens to the sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common import overlap
from .hopper_decode import (
    code_layout,
    decode_bf16,
    decode_fp8,
    decode_int8,
    mma_layout,
    over_words,
    scale_layout,
    step_words,
    to_lanes,
)
from .hopper_output import finish, in_units, load_partial, store_partial

# Triton 3.6 has other names.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
wait_inputs = gluon.jit(overlap.wait_inputs.fn)
start_next = gluon.jit(overlap.start_next.fn)

STEP_K = gl.constexpr(128)  # channels of a step: one panel of x (`upcast.py`)
STEP_WORDS = gl.constexpr(16)  # int32 words of 4-bit codes of a step, in a weight row
# Registers of a thread, for all warpgroups but the first, which gets what is left. A multiprocessor has 65,536 and a
# warpgroup 128 threads: two warpgroups of 240 take 61,440, four of 112 take 57,344. Four of 120 would take 61,440, all
# that the launch has (640 threads of 96). The copying warp needs few; 24 is the least that can be set.
REGISTERS_OF_2 = gl.constexpr(240)
REGISTERS_OF_4 = gl.constexpr(112)
REGISTERS_TO_COPY = gl.constexpr(24)


@gluon.jit
def _work_item(
    pid,
    sizes,
    N: gl.constexpr,
    K: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILE_M: gl.constexpr,
    GROUP_M: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Of the pid-th work item: (first weight row, first row of x, first channel, steps, part).

    part: -1 for a whole tile. Else three numbers in one register: tile of the tail * 256 + index of the part * 16 +
    number of parts."""
    M, _, whole_tiles, split_k = sizes
    tile = pid
    start = 0
    steps = K // STEP_K
    part = -1
    if SPLIT:
        if pid >= whole_tiles:
            tail = (pid - whole_tiles) // split_k
            tile = whole_tiles + tail
            index = (pid - whole_tiles) % split_k
            begin = index * (K // STEP_K) // split_k
            steps = (index + 1) * (K // STEP_K) // split_k - begin
            start = begin * STEP_K
            part = tail * 256 + index * 16 + split_k
    tiles_n = gl.cdiv(N, BLOCK_N)
    band = (tile // (GROUP_M * tiles_n)) * GROUP_M
    height = gl.minimum(gl.cdiv(M, TILE_M) - band, GROUP_M)
    row_m = (band + (tile % (GROUP_M * tiles_n)) % height) * TILE_M
    row_n = ((tile % (GROUP_M * tiles_n)) // height) * BLOCK_N
    return row_n, row_m, start, steps, part


@gluon.jit
def _produce(
    read,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """The copying warp: copies the steps of a program's work items, as far ahead as there are stages. With `prefetch`
    it copies the first weights while the kernel in front still runs.

    read: (w, x, x_extra, buffers, sizes, prefetch). buffers: (tiles of w, of x, of x_extra, barriers of full stages, of
    empty ones). sizes: (M, work_items, whole_tiles, split_k)."""
    w, x, x_extra, buffers, sizes, prefetch = read
    w_tiles, x_tiles, x_extra_tiles, full, empty = buffers
    work_items = sizes[1]
    TILE_M: gl.constexpr = BLOCK_M + EXTRA_M
    X_BYTES: gl.constexpr = 1 if FORMAT == "mxfp4" else 2
    CODES: gl.constexpr = STEP_K // step_words(FORMAT)  # in a word
    STEP_BYTES: gl.constexpr = BLOCK_N * step_words(FORMAT) * 4 + TILE_M * STEP_K * X_BYTES
    row_n, row_m, start, steps, _ = _work_item(gl.program_id(0), sizes, N, K, BLOCK_N, TILE_M, GROUP_M, SPLIT)
    first = gl.minimum(steps, STAGES)
    for i in range(first):
        mbarrier.expect(full.index(i), STEP_BYTES)
        async_load(w, [row_n, (start + i * STEP_K) // CODES], full.index(i), w_tiles.index(i))
    if prefetch:
        wait_inputs(True)
    before = 0
    for pid in range(gl.program_id(0), work_items, gl.num_programs(0)):
        row_n, row_m, start, steps, _ = _work_item(pid, sizes, N, K, BLOCK_N, TILE_M, GROUP_M, SPLIT)
        for i in range(steps):
            step = before + i
            stage = step % STAGES
            k = start + i * STEP_K
            if step >= first:
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), STEP_BYTES)
                async_load(w, [row_n, k // CODES], full.index(stage), w_tiles.index(stage))
            async_load(x, [row_m, k], full.index(stage), x_tiles.index(stage))
            if x_extra is not None:
                async_load(x_extra, [row_m + BLOCK_M, k], full.index(stage), x_extra_tiles.index(stage))
        before += steps


@gluon.jit
def _scale_bytes(scales, k, last, FORMAT: gl.constexpr):
    """Scale bytes of a step, int32 [ROWS, H, 4]; of int8 weights the bf16 scales. last: None, or the last group of a
    row, as seen from each byte; the codes beyond it are zeros, and its scale may stand for theirs."""
    group = k // (16 if FORMAT == "nvfp4" else 32)
    if last is not None:
        group = gl.minimum(group, last)
    if FORMAT == "int8":
        return gl.load(scales + group)
    else:
        return gl.load(scales + group).to(gl.int32)


@gluon.jit
def _multiply(left, right, right_extra, acc, acc_extra, EXTRA_M: gl.constexpr):
    """(acc, acc_extra) + left @ (right, right_extra), finished when it returns.

    Until a product is done, the tensor core reads the registers of its left operand. The ptxas of Triton 3.6 reuses
    them earlier (seen as NaN on an H100), hence the wait. The other warpgroups decode meanwhile."""
    if EXTRA_M > 0:
        acc = warpgroup_mma(left, right.permute((1, 0)), acc, is_async=True)
        # Runs behind the first product, which has the same left operand.
        acc_extra = warpgroup_mma(left, right_extra.permute((1, 0)), acc_extra)
        acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        acc = warpgroup_mma(left, right.permute((1, 0)), acc)
    return acc, acc_extra


@gluon.jit
def _consume(
    use,
    WARPGROUP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    """One of a program's multiplying warpgroups: its share of every work item. Four warpgroups have no registers left
    for a loop over work items; their programs do one each.

    use: (buffers, operands, sizes). operands: (w_scales, w_top, x_unit, (gx, gw, bias, residual), out, partials,
    arrivals)."""
    buffers, operands, sizes = use
    M, work_items, whole_tiles, split_k = sizes
    TILE_M: gl.constexpr = BLOCK_M + EXTRA_M
    SPLIT: gl.constexpr = operands[5] is not None
    if WARPGROUPS == 4:
        item = _work_item(gl.program_id(0), sizes, N, K, BLOCK_N, TILE_M, GROUP_M, SPLIT)
        consume_item(
            buffers, operands, item, M, 0, WARPGROUP, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, STAGES, WARPGROUPS
        )
    else:
        before = 0
        for pid in range(gl.program_id(0), work_items, gl.num_programs(0)):
            item = _work_item(pid, sizes, N, K, BLOCK_N, TILE_M, GROUP_M, SPLIT)
            before = consume_item(
                buffers,
                operands,
                item,
                M,
                before,
                WARPGROUP,
                N,
                K,
                FORMAT,
                BLOCK_N,
                BLOCK_M,
                EXTRA_M,
                STAGES,
                WARPGROUPS,
            )


@gluon.jit
def consume_item(
    buffers,
    operands,
    item,
    M,
    before,
    WARPGROUP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    expert=None,
):
    """A warpgroup's share of one work item: decodes and multiplies its weight rows and writes the results.

    M: no row of x from M on is this item's. before: steps that the program has done so far. Returns that number with
    this item's steps added. expert: which of several weights [E, N, K] it is, or None."""
    w_tiles, x_tiles, x_extra_tiles, full, empty = buffers
    w_scales, w_top, x_unit, extras, out, partials, arrivals = operands
    row_n, row_m, start, steps, part = item
    ROWS: gl.constexpr = BLOCK_N // WARPGROUPS
    G: gl.constexpr = 16 if FORMAT == "nvfp4" else 32
    if expert is not None:
        w_scales += expert.to(gl.int64) * N * (K // G)
        if w_top is not None:
            w_top += expert.to(gl.int64) * N
    ACC: gl.constexpr = mma_layout(BLOCK_M, FORMAT)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if FORMAT == "mxfp4" else 2)
    SCALES: gl.constexpr = scale_layout(ROWS, FORMAT)
    WORDS: gl.constexpr = gl.SliceLayout(2, code_layout(ROWS, FORMAT))  # [ROWS, 16]
    BYTES: gl.constexpr = gl.SliceLayout(3, SCALES)  # [ROWS, H, 4]
    first = row_n + WARPGROUP * ROWS
    n = gl.minimum(first + gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, BYTES))), N - 1)
    half = gl.arange(0, 1 if FORMAT == "mxfp4" else 2, gl.SliceLayout(0, gl.SliceLayout(2, BYTES)))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, BYTES)))
    LANES: gl.constexpr = 2 if FORMAT == "mxfp4_bf16" or FORMAT == "int8" else 1  # that share a scale byte
    groups = gl.expand_dims(gl.expand_dims(half, 0), 2) * (4 // LANES)
    groups += gl.expand_dims(gl.expand_dims(lane // LANES, 0), 1)
    rows = gl.expand_dims(gl.expand_dims(n, 1), 2)
    scales = w_scales + rows.to(gl.int64) * (K // G) + (start // G + groups)
    last = None
    if K % STEP_K != 0:
        last = K // G - 1 - (start // G + groups)
    if w_top is not None:
        top = gl.load(w_top + rows).to(gl.int32)
    acc = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
    acc_extra = acc
    if EXTRA_M > 0:
        acc_extra = gl.zeros([ROWS, EXTRA_M], gl.float32, mma_layout(EXTRA_M, FORMAT))
    byte = _scale_bytes(scales, 0, last, FORMAT)
    mbarrier.wait(full.index(before % STAGES), before // STAGES & 1)
    codes = w_tiles.index(before % STAGES).slice(WARPGROUP * ROWS, ROWS, 0).load(WORDS)
    for i in range(steps):
        stage = (before + i) % STAGES
        right = x_tiles.index(stage)
        right_extra = x_extra_tiles.index(stage)
        if FORMAT == "mxfp4":
            a, b = decode_fp8(codes, over_words(gl.maximum(byte - top, -26), ROWS, FORMAT), ROWS)
            # Each half of the panel is one half of a step's channels. Both form one operand; no register moves.
            both = gl.permute(gl.join(to_lanes(a, ROWS, FORMAT), to_lanes(b, ROWS, FORMAT)), [0, 2, 1])
            both = gl.reshape(both, [ROWS, STEP_K]).to(gl.float8e5, bitcast=True)
            left = gl.convert_layout(both, LEFT, assert_trivial=True)
        elif FORMAT == "int8":
            a, b = decode_int8(codes, over_words(byte, ROWS, FORMAT), ROWS)
            left = gl.convert_layout(a, LEFT, assert_trivial=True)
            right_a, extra_a = right.slice(0, 64, 1), right_extra.slice(0, 64, 1)
            acc, acc_extra = _multiply(left, right_a, extra_a, acc, acc_extra, EXTRA_M)
            left = gl.convert_layout(b, LEFT, assert_trivial=True)
            right = right.slice(64, 64, 1)
            right_extra = right_extra.slice(64, 64, 1)
        else:
            if FORMAT == "nvfp4":
                # e4m3's bits in fp32's fields are its value times 2^-120. Its value times 2^119, times a code's pattern
                # of 2^-126, fits bf16.
                factor = (byte << 20).to(gl.float32, bitcast=True) * 2.0**120 * 2.0**119
                factor = gl.where(byte == 127, float("nan"), factor).to(gl.bfloat16)
            else:
                # `decode.e8m0_factor_bf16`; bf16 has fp32's exponent field.
                factor = gl.maximum(byte - top + 253, 1) << 23
                factor = factor.to(gl.float32, bitcast=True).to(gl.bfloat16)
            a, b = decode_bf16(codes, over_words(factor, ROWS, FORMAT), ROWS)
            left = gl.convert_layout(to_lanes(a, ROWS, FORMAT), LEFT, assert_trivial=True)
            right_a, extra_a = right.slice(0, 64, 1), right_extra.slice(0, 64, 1)
            acc, acc_extra = _multiply(left, right_a, extra_a, acc, acc_extra, EXTRA_M)
            left = gl.convert_layout(to_lanes(b, ROWS, FORMAT), LEFT, assert_trivial=True)
            right = right.slice(64, 64, 1)
            right_extra = right_extra.slice(64, 64, 1)
        ahead = gl.minimum(i + 1, steps - 1)
        byte = _scale_bytes(scales, ahead * STEP_K, last, FORMAT)
        ahead += before
        mbarrier.wait(full.index(ahead % STAGES), ahead // STAGES & 1)
        codes = w_tiles.index(ahead % STAGES).slice(WARPGROUP * ROWS, ROWS, 0).load(WORDS)
        acc, acc_extra = _multiply(left, right, right_extra, acc, acc_extra, EXTRA_M)
        mbarrier.arrive(empty.index(stage))
    acc = in_units(acc, first, row_m, w_top, x_unit, M, N, FORMAT, ROWS, BLOCK_M)
    if EXTRA_M > 0:
        acc_extra = in_units(acc_extra, first, row_m + BLOCK_M, w_top, x_unit, M, N, FORMAT, ROWS, EXTRA_M)
    done = True
    if partials is not None:
        if part >= 0:
            index = part // 16 % 16
            slot = part // 256 * WARPGROUPS + WARPGROUP
            sums = partials + slot.to(gl.int64) * (ROWS * (BLOCK_M + EXTRA_M))
            # Each part hands its sums to the next one, in order. All parts lie in one round of the programs
            # (`choose.split_tail`), so a part waits for a lower program number, which is already on the GPU
            # (`overlap.wait_arrivals`).
            seen = 0
            while seen < index:
                seen = gl.atomic_add(arrivals + slot, 0, sem="acquire")
            acc += load_partial(sums, index > 0, ROWS, BLOCK_M, ACC)
            if EXTRA_M > 0:
                acc_extra += load_partial(sums + ROWS * BLOCK_M, index > 0, ROWS, EXTRA_M, mma_layout(EXTRA_M, FORMAT))
            done = index == part % 16 - 1
            if done:
                gl.store(arrivals + slot, 0)
            else:
                store_partial(sums, acc, ROWS, BLOCK_M)
                if EXTRA_M > 0:
                    store_partial(sums + ROWS * BLOCK_M, acc_extra, ROWS, EXTRA_M)
                barrier()
                gl.atomic_add(arrivals + slot, 1, sem="release")
    if done:
        finish(acc, first, row_m, extras, out, M, N, ROWS, BLOCK_M, expert)
        if EXTRA_M > 0:
            finish(acc_extra, first, row_m + BLOCK_M, extras, out, M, N, ROWS, EXTRA_M, expert)
    return before + steps


@gluon.jit(do_not_specialize=["M", "work_items", "whole_tiles", "split_k", "prefetch"])
def hopper_gemm_kernel(
    x,
    x_extra,
    x_unit,
    gx,
    w,
    w_scales,
    w_top,
    gw,
    bias,
    residual,
    out,
    partials,
    arrivals,
    M,
    work_items,
    whole_tiles,
    split_k,
    prefetch,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    EXTRA_M: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    """out [M, N].

    Tensor descriptors: w int32 [N, K/8] in tiles [BLOCK_N, 16]; x [M, K] in tiles [BLOCK_M, 128], in lane order: e5m2
    or e4m3 where FORMAT is mxfp4, bf16 where FORMAT is mxfp4_bf16 or nvfp4. A tile has BLOCK_M + EXTRA_M rows of x; if
    EXTRA_M > 0, x_extra is x in tiles [EXTRA_M, 128].
    w_scales: uint8 [N, K/G]. MXFP4: w_top uint8 [N]. x_unit: fp32 [M], factors of x's rows, or None.
    prefetch: whether the weight and its scales may be read before the kernels in front have ended.

    The first `whole_tiles` of the tiles are a work item each. Every tile of the tail behind them is `split_k` work
    items, one for each part of K. There are `work_items` in all. A program takes one after the other, with a stride of
    the number of programs. That number is at most the number of multiprocessors with two warpgroups, and `work_items`
    with four.
    partials: fp32 [tail, BLOCK_N * (BLOCK_M + EXTRA_M)]. arrivals: int32 [tail * WARPGROUPS], zeros before and after.
    Both are None if there is no tail.

    Launched with 4 warps, which are the first of the 2 or 4 warpgroups that multiply."""
    SPLIT: gl.constexpr = partials is not None
    if prefetch == 0:
        wait_inputs(True)
    w_tiles = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, step_words(FORMAT)], w.layout)
    x_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, BLOCK_M, STEP_K], x.layout)
    x_extra_tiles = x_tiles
    if EXTRA_M > 0:
        x_extra_tiles = gl.allocate_shared_memory(x.dtype, [STAGES, EXTRA_M, STEP_K], x_extra.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    buffers = (w_tiles, x_tiles, x_extra_tiles, full, empty)
    operands = (w_scales, w_top, x_unit, (gx, gw, bias, residual), out, partials, arrivals)
    sizes = (M, work_items, whole_tiles, split_k)
    read = (w, x, x_extra, buffers, sizes, prefetch)
    use = (buffers, operands, sizes)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (use, 0, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_consume, (use, 1, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_produce, (read, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, SPLIT)),
            ],
            [4, 1],
            [REGISTERS_OF_2, REGISTERS_TO_COPY],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (use, 0, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_consume, (use, 1, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_consume, (use, 2, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_consume, (use, 3, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, WARPGROUPS)),
                (_produce, (read, N, K, FORMAT, BLOCK_N, BLOCK_M, EXTRA_M, GROUP_M, STAGES, SPLIT)),
            ],
            [4, 4, 4, 1],
            [REGISTERS_OF_4, REGISTERS_OF_4, REGISTERS_OF_4, REGISTERS_TO_COPY],
        )
    start_next(True)
