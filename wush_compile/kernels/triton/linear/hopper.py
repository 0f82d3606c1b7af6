"""The product of many rows on Hopper: weights decoded in registers, everything else moved by the copy engine (Gluon).

One warp asks the bulk copy engine (TMA) for tiles of packed weights and of x, several steps ahead; two or four warpgroups
decode their weight rows straight into the left operand of `wgmma`, each while the tensor cores work for another. Gluon says
who does what, which Triton's own pipeline of the same product (`triton_gemm`) does not: there copying, decoding and
multiplying wait for each other.

Operands, arithmetic and results are those of `triton_gemm.fused_gemm_kernel` with x expanded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from ..common import formats as triton_formats
from ..common import overlap as triton_launch
from ..common.decode import BF16_PTX, E5M2_UNIT, fp8_ptx

# Triton 3.6 has other names.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
e8m0_factor = gluon.jit(triton_formats.e8m0_factor.fn)
wait_inputs = gluon.jit(triton_launch.wait_inputs.fn)
start_next = gluon.jit(triton_launch.start_next.fn)

BK = gl.constexpr(128)  # channels of a step: one panel of x (`triton_expand`)
WORDS_OF_STEP = gl.constexpr(16)  # of codes, in a weight row


@gluon.constexpr_function
def mma_layout(BM, MX):
    """Of a warpgroup's accumulator [64 or 128, BM]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32 if MX else 16])


@gluon.constexpr_function
def code_layout(R, MX):
    """Registers of packed weights [R, 16 words, 4 bytes]: rows as in `wgmma`'s left operand; a lane of four holds the words
    of one scale group side by side, MXFP4: 4 of a row, NVFP4: 2 in either half."""
    words, lanes = ([1, 2], [4, 8]) if MX else ([1, 8], [2, 4])
    registers = [[0, 0, 1], [0, 0, 2]] + [[0, w, 0] for w in words] + [[8, 0, 0]] + ([[64, 0, 0]] if R == 128 else [])
    return gl.DistributedLinearLayout(
        registers,
        [[0, w, 0] for w in lanes] + [[1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [R, 16, 4],
    )


@gluon.constexpr_function
def scale_layout(R, MX):
    """Registers of their scale bytes [R, halves, 4 lanes, words of codes]."""
    registers = [[0, 0, 0, 1]] + ([[0, 0, 0, 2]] if MX else [[0, 1, 0, 0]]) + [[8, 0, 0, 0]]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        registers + ([[64, 0, 0, 0]] if R == 128 else []),
        lanes,
        [[16, 0, 0, 0], [32, 0, 0, 0]],
        [],
        [R, 1 if MX else 2, 4, 4 if MX else 2],
    )


@gluon.jit
def _place(
    pid,
    M,
    whole,
    split,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    ROWS: gl.constexpr,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
):
    """(first weight row, first row of x, first channel, steps, part) of the pid-th piece of work; part: -1 for a whole tile, else
    which tile of the tail, which of its parts and of how many, in one register."""
    tile = pid
    start = 0
    steps = K // BK
    part = -1
    if PARTS:
        if pid >= whole:
            tail = (pid - whole) // split
            tile = whole + tail
            index = (pid - whole) % split
            begin = index * (K // BK) // split
            steps = (index + 1) * (K // BK) // split - begin
            start = begin * BK
            part = tail * 256 + index * 16 + split
    tiles_n = gl.cdiv(N, BN)
    band = (tile // (GROUP * tiles_n)) * GROUP
    height = gl.minimum(gl.cdiv(M, ROWS) - band, GROUP)
    row_m = (band + (tile % (GROUP * tiles_n)) % height) * ROWS
    row_n = ((tile % (GROUP * tiles_n)) // height) * BN
    return row_n, row_m, start, steps, part


@gluon.jit
def _produce(
    w,
    x,
    x_more,
    buffers,
    sizes,
    early,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    MORE: gl.constexpr,
    GROUP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    TILE_BYTES: gl.constexpr,
):
    """Copies the steps of a program's pieces of work, as far ahead as there are stages; the very first weights while the kernel
    in front still runs, if `early`."""
    ws, xs, xs_more, full, empty = buffers
    M, total, whole, split = sizes
    row_n, row_m, start, steps, _ = _place(gl.program_id(0), M, whole, split, N, K, BN, BM + MORE, GROUP, PARTS)
    first = gl.minimum(steps, STAGES)
    for i in range(first):
        mbarrier.expect(full.index(i), TILE_BYTES)
        async_load(w, [row_n, (start + i * BK) // 8], full.index(i), ws.index(i))
    if early:
        wait_inputs(True)
    before = 0
    for pid in range(gl.program_id(0), total, gl.num_programs(0)):
        row_n, row_m, start, steps, _ = _place(pid, M, whole, split, N, K, BN, BM + MORE, GROUP, PARTS)
        for i in range(steps):
            step = before + i
            stage = step % STAGES
            k = start + i * BK
            if step >= first:
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(stage), TILE_BYTES)
                async_load(w, [row_n, k // 8], full.index(stage), ws.index(stage))
            async_load(x, [row_m, k], full.index(stage), xs.index(stage))
            if x_more is not None:
                async_load(x_more, [row_m + BM, k], full.index(stage), xs_more.index(stage))
        before += steps


@gluon.jit
def _scale_bytes(scales, k, MX: gl.constexpr):
    """Scale bytes of a step, int32 [R, halves, 4]."""
    return gl.load(scales + k // (32 if MX else 16)).to(gl.int32)


@gluon.jit
def _bytes(t, R: gl.constexpr, MX: gl.constexpr):
    """[R, 16], the same value for each of a word's bytes: [R, 16, 4]."""
    t, _ = gl.broadcast(gl.expand_dims(t, 2), gl.full([R, 16, 4], 0, gl.int32, code_layout(R, MX)))
    return t


@gluon.jit
def _words(t, R: gl.constexpr, MX: gl.constexpr):
    """[R, halves, 4] -> the same value for each of a group's words: [R, 16]."""
    SCALES: gl.constexpr = scale_layout(R, MX)
    t, _ = gl.broadcast(gl.expand_dims(t, 3), gl.full([R, 1 if MX else 2, 4, 4 if MX else 2], 0, gl.int32, SCALES))
    return gl.convert_layout(gl.reshape(t, [R, 16]), gl.SliceLayout(2, code_layout(R, MX)), assert_trivial=True)


@gluon.jit
def _decode_fp8(words, e, R: gl.constexpr):
    """`triton_gemm.decode_fp8` of words int32 [R, 16] and their exponents: uint8 [R, 64] each."""
    a, b = gl.inline_asm_elementwise(
        fp8_ptx("$2", "$6"),
        "=&r,=&r,r,r,r,r,r,r,r,r",
        [_bytes(words, R, True), _bytes(e, R, True)],
        dtype=(gl.uint8, gl.uint8),
        is_pure=True,
        pack=4,
    )
    return gl.reshape(a, [R, 64]), gl.reshape(b, [R, 64])


@gluon.jit
def _decode_bf16(words, factor, R: gl.constexpr):
    """`triton_expand.decode_bf16` of words int32 [R, 16], times their factors: bf16 [R, 64] each."""
    a, b = gl.inline_asm_elementwise(
        BF16_PTX,
        "=r,=r,=r,=r,r,r,r,r",
        [_bytes(words, R, False)],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )
    factor = _bytes(factor, R, False)
    return gl.reshape(a * factor, [R, 64]), gl.reshape(b * factor, [R, 64])


@gluon.jit
def _to_lanes(t, R: gl.constexpr, MX: gl.constexpr):
    """`triton_gemm._to_lanes`."""
    B: gl.constexpr = 4 if MX else 2
    return gl.reshape(gl.permute(gl.reshape(t, [R, 64 // (16 * B), 4, 4, B]), [0, 1, 3, 2, 4]), [R, 64])


@gluon.jit
def _multiply(left, right, right_more, acc, more, MORE: gl.constexpr):
    """(acc, more) + left @ (right, right_more), waited for at once: until a product is done, the tensor core reads its left
    operand's registers, which the ptxas of Triton 3.6 gives away (seen as NaN on an H100). The other warpgroups decode
    meanwhile."""
    if MORE > 0:
        acc = warpgroup_mma(left, right.permute((1, 0)), acc, is_async=True)
        more = warpgroup_mma(left, right_more.permute((1, 0)), more)  # behind the other, which has the same operand
        acc = warpgroup_mma_wait(0, deps=[acc])
    else:
        acc = warpgroup_mma(left, right.permute((1, 0)), acc)
    return acc, more


@gluon.jit
def _consume(
    buffers,
    operands,
    sizes,
    WARPGROUP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    MX: gl.constexpr,
    R: gl.constexpr,
    BM: gl.constexpr,
    MORE: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    """One of a program's warpgroups: decodes and multiplies R weight rows of every tile, and writes their results. Four have no
    registers left for a loop: their programs do one piece of work each."""
    M, total, whole, split = sizes
    PARTS: gl.constexpr = operands[8] is not None
    if WARPGROUPS == 4:
        place = _place(gl.program_id(0), M, whole, split, N, K, R * WARPGROUPS, BM + MORE, GROUP, PARTS)
        _tile(buffers, operands, place, M, 0, WARPGROUP, N, K, MX, R, BM, MORE, STAGES, WARPGROUPS)
    else:
        before = 0
        for pid in range(gl.program_id(0), total, gl.num_programs(0)):
            place = _place(pid, M, whole, split, N, K, R * WARPGROUPS, BM + MORE, GROUP, PARTS)
            before = _tile(buffers, operands, place, M, before, WARPGROUP, N, K, MX, R, BM, MORE, STAGES, WARPGROUPS)


@gluon.jit
def _tile(
    buffers,
    operands,
    place,
    M,
    before,
    WARPGROUP: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    MX: gl.constexpr,
    R: gl.constexpr,
    BM: gl.constexpr,
    MORE: gl.constexpr,
    STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr,
):
    """A warpgroup's share of one piece of work, in front of which there were `before` steps; returns how many there were then."""
    ws, xs, xs_more, full, empty = buffers
    w_scales, w_top, x_unit, gx, gw, bias, residual, out, parts, count = operands
    row_n, row_m, start, steps, part = place
    G: gl.constexpr = 32 if MX else 16
    ACC: gl.constexpr = mma_layout(BM, MX)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if MX else 2)
    SCALES: gl.constexpr = scale_layout(R, MX)
    WORDS: gl.constexpr = gl.SliceLayout(2, code_layout(R, MX))  # [R, 16]
    FEW: gl.constexpr = gl.SliceLayout(3, SCALES)  # [R, halves, 4]
    first = row_n + WARPGROUP * R
    n = gl.minimum(first + gl.arange(0, R, gl.SliceLayout(1, gl.SliceLayout(2, FEW))), N - 1)
    half = gl.arange(0, 1 if MX else 2, gl.SliceLayout(0, gl.SliceLayout(2, FEW)))
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FEW)))
    groups = gl.expand_dims(gl.expand_dims(half, 0), 2) * 4 + gl.expand_dims(gl.expand_dims(lane, 0), 1)
    rows = gl.expand_dims(gl.expand_dims(n, 1), 2)
    scales = w_scales + rows.to(gl.int64) * (K // G) + (start // G + groups)
    if MX:
        top = gl.load(w_top + rows).to(gl.int32)
    acc = gl.zeros([R, BM], gl.float32, ACC)
    more = acc
    if MORE > 0:
        more = gl.zeros([R, MORE], gl.float32, mma_layout(MORE, MX))
    byte = _scale_bytes(scales, 0, MX)
    mbarrier.wait(full.index(before % STAGES), before // STAGES & 1)
    codes = ws.index(before % STAGES).slice(WARPGROUP * R, R, 0).load(WORDS)
    for i in range(steps):
        stage = (before + i) % STAGES
        right = xs.index(stage)
        right_more = xs_more.index(stage)
        if MX:
            a, b = _decode_fp8(codes, _words(gl.maximum(byte - top, -26), R, MX), R)
            # Either half of the panel is one half of a step's channels: both are one operand, of registers as they are.
            both = gl.permute(gl.join(_to_lanes(a, R, MX), _to_lanes(b, R, MX)), [0, 2, 1])
            both = gl.reshape(both, [R, BK]).to(gl.float8e5, bitcast=True)
            left = gl.convert_layout(both, LEFT, assert_trivial=True)
        else:
            # e4m3's bits are its value times 2^-120 in fp32's fields; 2^119 times it times a pattern's 2^-126 fits bf16.
            factor = (byte << 20).to(gl.float32, bitcast=True) * 2.0**120 * 2.0**119
            factor = gl.where(byte == 127, float("nan"), factor).to(gl.bfloat16)
            a, b = _decode_bf16(codes, _words(factor, R, MX), R)
            left = gl.convert_layout(_to_lanes(a, R, MX), LEFT, assert_trivial=True)
            acc, more = _multiply(left, right.slice(0, 64, 1), right_more.slice(0, 64, 1), acc, more, MORE)
            left = gl.convert_layout(_to_lanes(b, R, MX), LEFT, assert_trivial=True)
            right = right.slice(64, 64, 1)
            right_more = right_more.slice(64, 64, 1)
        ahead = gl.minimum(i + 1, steps - 1)
        byte = _scale_bytes(scales, ahead * BK, MX)
        ahead += before
        mbarrier.wait(full.index(ahead % STAGES), ahead // STAGES & 1)
        codes = ws.index(ahead % STAGES).slice(WARPGROUP * R, R, 0).load(WORDS)
        acc, more = _multiply(left, right, right_more, acc, more, MORE)
        mbarrier.arrive(empty.index(stage))
    acc = _in_units(acc, first, row_m, w_top, x_unit, M, N, R, BM)
    if MORE > 0:
        more = _in_units(more, first, row_m + BM, w_top, x_unit, M, N, R, MORE)
    done = True
    if parts is not None:
        if part >= 0:
            index = part // 16 % 16
            place_of = part // 256 * WARPGROUPS + WARPGROUP
            sums = parts + place_of.to(gl.int64) * (R * (BM + MORE))
            # Sums are handed on from part to part, in their order: in one round of the programs (`triton_choose.parts`), from one
            # with a lower number, which has a place already (`triton_launch.wait_arrivals`).
            seen = 0
            while seen < index:
                seen = gl.atomic_add(count + place_of, 0, sem="acquire")
            acc += _load_part(sums, index > 0, R, BM, ACC)
            if MORE > 0:
                more += _load_part(sums + R * BM, index > 0, R, MORE, mma_layout(MORE, MX))
            done = index == part % 16 - 1
            if done:
                gl.store(count + place_of, 0)
            else:
                _store_part(sums, acc, R, BM)
                if MORE > 0:
                    _store_part(sums + R * BM, more, R, MORE)
                barrier()
                gl.atomic_add(count + place_of, 1, sem="release")
    if done:
        _finish(acc, first, row_m, gx, gw, bias, residual, out, M, N, R, BM)
        if MORE > 0:
            _finish(more, first, row_m + BM, gx, gw, bias, residual, out, M, N, R, MORE)
    return before + steps


@gluon.jit
def _in_units(acc, first, row_m, w_top, x_unit, M, N: gl.constexpr, R: gl.constexpr, BM: gl.constexpr):
    """The tensor core's sums times the units of their operands."""
    if w_top is not None:
        n = gl.minimum(first + gl.arange(0, R, gl.SliceLayout(1, acc.type.layout)), N - 1)
        m = gl.minimum(row_m + gl.arange(0, BM, gl.SliceLayout(0, acc.type.layout)), M - 1)
        acc = acc * (e8m0_factor(gl.load(w_top + n).to(gl.int32)) * E5M2_UNIT)[:, None]
        return acc * gl.load(x_unit + m)[None, :]
    return acc * 128.0


@gluon.jit
def _part_offsets(R: gl.constexpr, BM: gl.constexpr):
    """Where a part of a tile keeps a warpgroup's sums: every thread's four by four, side by side."""
    FOURS: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [1, 4, 1], [2, 1, 0])
    block = gl.arange(0, R * BM // 512, gl.SliceLayout(1, gl.SliceLayout(2, FOURS)))
    thread = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(2, FOURS)))
    four = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, FOURS)))
    first = gl.expand_dims(gl.expand_dims(block, 1), 2) * 512 + gl.expand_dims(gl.expand_dims(thread, 0), 2) * 4
    return first + gl.expand_dims(gl.expand_dims(four, 0), 1)


@gluon.jit
def _store_part(part, acc, R: gl.constexpr, BM: gl.constexpr):
    at = part + _part_offsets(R, BM)
    # Bits of rows and columns as `mma_layout` spreads them over registers and threads: nothing moves.
    t = gl.permute(gl.reshape(acc, [R // 64, 4, 2, 8, BM // 8, 4, 2]), [0, 4, 1, 3, 5, 2, 6])
    t = gl.convert_layout(gl.reshape(t, [R * BM // 512, 128, 4]), at.type.layout, assert_trivial=True)
    gl.store(at, t, cache_modifier=".cg")


@gluon.jit
def _load_part(part, there, R: gl.constexpr, BM: gl.constexpr, ACC: gl.constexpr):
    """What `_store_part` stored, if it is there, or zeros: fp32 [R, BM]."""
    at = part + _part_offsets(R, BM)
    t = gl.load(
        at, mask=gl.full([R * BM // 512, 128, 4], there, gl.int1, at.type.layout), other=0.0, cache_modifier=".cg"
    )
    t = gl.permute(gl.reshape(t, [R // 64, BM // 8, 4, 8, 4, 2, 2]), [0, 2, 5, 3, 1, 4, 6])
    return gl.convert_layout(gl.reshape(t, [R, BM]), ACC, assert_trivial=True)


@gluon.jit
def _finish(y, first, row_m, gx, gw, bias, residual, out, M, N: gl.constexpr, R: gl.constexpr, BM: gl.constexpr):
    """`triton_gemv.finish` of a warpgroup's tile, written a row of x at a time."""
    if gx is not None and gw is not None:
        y = y * gl.div_rn(1.0, gl.load(gx) * gl.load(gw))
    elif gx is not None:
        y = y * gl.div_rn(1.0, gl.load(gx))
    elif gw is not None:
        y = y * gl.div_rn(1.0, gl.load(gw))
    if bias is not None:
        n = first + gl.arange(0, R, gl.SliceLayout(1, y.type.layout))
        y += gl.load(bias + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [R // 64, 4 // (R // 64)], [0, 1])
    r = gl.convert_layout(y.to(out.dtype.element_ty), WIDE)
    n = first + gl.arange(0, R, gl.SliceLayout(1, WIDE))
    m = row_m + gl.arange(0, BM, gl.SliceLayout(0, WIDE))
    mask = (m < M)[None, :] & (n < N)[:, None]
    tile = row_m.to(gl.int64) * N + first
    offset = (m - row_m)[None, :] * N + (n - first)[:, None]
    if residual is not None:
        added = gl.load(residual + tile + offset, mask=mask, other=0.0).to(gl.float32)
        r = (r.to(gl.float32) + added).to(out.dtype.element_ty)
    gl.store(out + tile + offset, r, mask=mask)


@gluon.jit(do_not_specialize=["M", "total", "whole", "split", "early"])
def hopper_gemm_kernel(
    x,
    x_more,
    x_unit,
    gx,
    w,
    w_scales,
    w_top,
    gw,
    bias,
    residual,
    out,
    parts,
    count,
    M,
    total,
    whole,
    split,
    early,
    N: gl.constexpr,
    K: gl.constexpr,
    MX: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    MORE: gl.constexpr,
    WARPGROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """out [M, N]. Descriptors: w int32 [N, K/8] in tiles [BN, 16]; x e5m2 [M, K] in panels (`expand_fp8_kernel`; NVFP4:
    bf16, `expand_bf16_kernel`), tiles [BM, 128], and the same in tiles [MORE, 128] if a tile has BM + MORE rows of x, MORE > 0.
    w_scales uint8 [N, K/G], w_top uint8 [N] and x_unit fp32 [M] (MXFP4). early: whether what belongs to w may be read before the
    kernels in front have ended.
    Of the tiles of N times tiles of M the first `whole` are a piece of work each, those of the tail behind them one for each of
    `split` parts of K: `total` pieces, of which a program takes one after the other, each as many further as there are programs:
    with two warpgroups at most as many as multiprocessors, with four `total`.
    parts fp32 [tail, BN * (BM + MORE)], count int32 [tail * WARPGROUPS], zeros before and after, are None if there is no tail.
    4 warps: one of the 2 or 4 warpgroups that multiply."""
    R: gl.constexpr = BN // WARPGROUPS
    PARTS: gl.constexpr = parts is not None
    if early == 0:
        wait_inputs(True)
    ws = gl.allocate_shared_memory(gl.int32, [STAGES, BN, WORDS_OF_STEP], w.layout)
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, BM, BK], x.layout)
    xs_more = xs
    if MORE > 0:
        xs_more = gl.allocate_shared_memory(x.dtype, [STAGES, MORE, BK], x_more.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    TILE_BYTES: gl.constexpr = BN * WORDS_OF_STEP * 4 + (BM + MORE) * BK * (1 if MX else 2)
    buffers = (ws, xs, xs_more, full, empty)
    operands = (w_scales, w_top, x_unit, gx, gw, bias, residual, out, parts, count)
    sizes = (M, total, whole, split)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (buffers, operands, sizes, 0, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_consume, (buffers, operands, sizes, 1, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_produce, (w, x, x_more, buffers, sizes, early, N, K, BN, BM, MORE, GROUP, PARTS, STAGES, TILE_BYTES)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (buffers, operands, sizes, 0, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_consume, (buffers, operands, sizes, 1, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_consume, (buffers, operands, sizes, 2, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_consume, (buffers, operands, sizes, 3, N, K, MX, R, BM, MORE, GROUP, STAGES, WARPGROUPS)),
                (_produce, (w, x, x_more, buffers, sizes, early, N, K, BN, BM, MORE, GROUP, PARTS, STAGES, TILE_BYTES)),
            ],
            [4, 4, 4, 1],
            [112, 112, 112, 24],
        )
    start_next(True)
