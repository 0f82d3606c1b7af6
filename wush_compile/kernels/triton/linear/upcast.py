"""Packed rows to rows of fp8 (MXFP4) or bf16 (both formats) in memory, exact: operands of the library's products and of
those that decode only the weight.

In fp8 the group scales go into exponents relative to the row's largest byte. e5m2 holds 29 octaves of e2m1 values, e4m3
15 (docs/spec.md §8). Groups further below the row's maximum than that become zeros."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.decode import E4M3_TOP, E4M3_UNIT, E5M2_TOP, E5M2_UNIT, decode_bf16
from ..common.formats import e4m3_factor, e8m0_factor
from ..common.overlap import overlaps, start_next, wait_inputs
from .int8 import int8_upcast_kernel


@triton.jit
def _tables(e, E4M3: tl.constexpr):
    """Exponent fields -> (low, high): the fp8 bytes of the eight magnitudes. They go down to the subnormals, until 0.5
    is the last bit."""
    if E4M3:
        step = tl.maximum(e, 0) << 3
        low = step * 0x01010100 + 0x0C080000
        high = step * 0x01010101 + 0x1C181410
        low = tl.where(e == 0, 0x0C080400, low)
        low = tl.where(e == -1, 0x06040200, low)
        high = tl.where(e == -1, 0x14100C08, high)
        low = tl.where(e == -2, 0x03020100, low)
        high = tl.where(e == -2, 0x0C080604, high)
        smallest: tl.constexpr = -2
    else:
        step = tl.maximum(e, 0) << 2
        low = step * 0x01010100 + 0x06040000
        high = step * 0x01010101 + 0x0E0C0A08
        low = tl.where(e == 0, 0x06040200, low)
        low = tl.where(e == -1, 0x03020100, low)
        high = tl.where(e == -1, 0x0A080604, high)
        smallest: tl.constexpr = -1
    return tl.where(e < smallest, 0, low), tl.where(e < smallest, 0, high)


@triton.jit
def _look_up(w, low, high):
    """8 codes -> the fp8 bytes of codes 0..3 and of codes 4..7."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 m, h, a, t;
        mov.b32 t, 0x80808080;
        and.b32 m, $2, 0x77777777;
        shr.u32 h, m, 16;
        prmt.b32 m, $3, $4, m;
        prmt.b32 h, $3, $4, h;
        prmt.b32 a, t, t, $2;
        shl.b32 a, a, 7;
        lop3.b32 $0, a, t, m, 0xEA;
        shr.u32 a, $2, 16;
        prmt.b32 a, t, t, a;
        shl.b32 a, a, 7;
        lop3.b32 $1, a, t, h, 0xEA; }""",
        "=r,=r,r,r,r",
        [w, low, high],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _store_lanes(out, first_group, first, second, K: tl.constexpr, GROUPS: tl.constexpr):
    """Stores the halves of GROUPS groups, [GROUPS, 4] words each, to a row: the first words of every 4 groups come
    first."""
    panel = first_group // 4 + tl.arange(0, GROUPS // 4)
    at = out + ((panel * 32)[:, None] + tl.arange(0, 16)[None, :])
    inside = (panel < (K + 127) // 128)[:, None]
    # Permuted before the store, so that a thread stores 16 bytes at once.
    first = tl.reshape(tl.permute(tl.reshape(first, (GROUPS // 4, 4, 4)), (0, 2, 1)), (GROUPS // 4, 16))
    second = tl.reshape(tl.permute(tl.reshape(second, (GROUPS // 4, 4, 4)), (0, 2, 1)), (GROUPS // 4, 16))
    tl.store(at, first, mask=inside)
    tl.store(at + 16, second, mask=inside)


@triton.jit
def source_row(index, r, T):
    """The row of T rows that a product's row r is made of: r itself without an index, else index[r], kept inside."""
    if index is None:
        return r
    else:
        return tl.minimum(tl.maximum(tl.load(index + r), 0), T - 1)


@triton.jit
def _upcast_fp8(
    r,
    source,
    first_step,
    stride,
    codes,
    scales,
    g,
    unit,
    out,
    K: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    LANE_ORDER: tl.constexpr,
):
    """Row r of `upcast_fp8_kernel`, from row `source`: the steps `first_step`, `first_step + stride`, ..."""
    scales += source.to(tl.int64) * (K // 32)
    codes += source.to(tl.int64) * (K // 8)
    out += r.to(tl.int64) * ((K + 127) // 128 * 32 if LANE_ORDER else K // 4)
    every = tl.arange(0, ROW_GROUPS)
    # The maximum is a scalar, which has no layout. Triton 3.6 repeats the reduction of a row of a tile in the layout of
    # the steps below. There the lanes of a row are not neighbours, and it exchanges values with the wrong lanes (seen
    # with 256 and 512 channels).
    top = tl.max(tl.load(scales + every, mask=every < K // 32, other=0).to(tl.int32), axis=0)
    factor = e8m0_factor(top) * (E4M3_UNIT if E4M3 else E5M2_UNIT)
    if SCALED:
        if g.dtype.element_ty == tl.bfloat16:
            factor = factor * tl.div_rn(1.0, tl.load(g + source).to(tl.float32))
        else:
            factor = factor * tl.div_rn(1.0, tl.load(g))
    tl.store(unit + r, factor)
    word = tl.arange(0, 4)[None, :]
    for i in tl.range(first_step, tl.cdiv(K // 32, GROUPS), stride):
        group = i * GROUPS + tl.arange(0, GROUPS)
        inside = group < K // 32
        b = tl.load(scales + group, mask=inside, other=0).to(tl.int32)
        low, high = _tables(b - top + (E4M3_TOP if E4M3 else E5M2_TOP), E4M3)
        inside = inside[:, None]
        w = tl.load(codes + ((group * 4)[:, None] + word), mask=inside, other=0)  # [GROUPS, 4]
        low = tl.broadcast_to(low[:, None], (GROUPS, 4))
        first, second = _look_up(w, low, tl.broadcast_to(high[:, None], (GROUPS, 4)))
        if LANE_ORDER:
            _store_lanes(out, i * GROUPS, first, second, K, GROUPS)
        else:
            at = out + ((group // 4 * 32 + group % 4 * 4)[:, None] + word)
            half = tl.where(group >= K // 128 * 4, K % 128 // 32 * 4, 16)  # words of a half
            tl.store(at, first, mask=inside)
            tl.store(at + half[:, None], second, mask=inside)


@triton.jit(do_not_specialize=["T"])
def upcast_fp8_kernel(
    codes,
    scales,
    g,
    unit,
    out,
    index,
    T,
    K: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    E4M3: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    LANE_ORDER: tl.constexpr,
    PDL: tl.constexpr,
):
    """MXFP4 codes int32 [rows, K/8], scales uint8 [rows, K/32] -> out int32 (fp8 bytes) [rows, K/4] and unit fp32
    [rows]. With an index, int [rows], row r is made of row index[r] of T rows.

    A row's bytes times its unit are its values, divided by g if SCALED: fp32 [1], or bf16 [rows], a factor of each row.
    ROW_GROUPS is K/32 rounded up to a power of two. A step takes GROUPS groups.

    Every 128 channels are stored as two halves: the channels 0..3 of every 8, then the channels 4..7. A look-up gives
    them in this order. With LANE_ORDER, for the fused product, the first words of the four groups of a half come first,
    then the second ones (`gemm._to_lanes`); rows of `out` are filled up with zeros to a multiple of 128 channels. Both
    operands of a product have the same order, so the order cancels. Without LANE_ORDER, where K is not a multiple of
    128, the last, shorter part has halves of its own. Grid (rows, programs a row)."""
    wait_inputs(PDL)
    r, first_step, stride = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    source = source_row(index, r, T)
    _upcast_fp8(
        r, source, first_step, stride, codes, scales, g, unit, out, K, ROW_GROUPS, E4M3, SCALED, GROUPS, LANE_ORDER
    )
    start_next(PDL)


@triton.jit(do_not_specialize=["M"])
def upcast_both_kernel(
    x,
    x_scales,
    gx,
    x_unit,
    x_out,
    w,
    w_scales,
    gw,
    w_unit,
    w_out,
    M,
    K: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    SCALED_X: tl.constexpr,
    SCALED_W: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`upcast_fp8_kernel` of both operands in one launch: x [M, K] to e5m2, w [N, K] to e4m3. Grid (M + N)."""
    wait_inputs(PDL)
    r = tl.program_id(0)
    if r < M:
        _upcast_fp8(r, r, 0, 1, x, x_scales, gx, x_unit, x_out, K, ROW_GROUPS, False, SCALED_X, GROUPS, False)
    else:
        _upcast_fp8(r - M, r - M, 0, 1, w, w_scales, gw, w_unit, w_out, K, ROW_GROUPS, True, SCALED_W, GROUPS, False)
    start_next(PDL)


@triton.jit(do_not_specialize=["T"])
def upcast_bf16_kernel(
    codes,
    scales,
    g,
    out,
    index,
    rows,
    T,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    LANE_ORDER: tl.constexpr,
    PDL: tl.constexpr,
):
    """codes uint8 [rows, K/2], scales uint8 [rows, K/G] -> out bf16 [rows, K], divided by g if SCALED. Exact without g,
    and with a g that is a power of two.

    LANE_ORDER: of every 128 channels the even ones come first, then the odd ones, both in the order of
    `gemm._to_lanes`; rows of `out` are filled up with zeros to a multiple of 128 channels. index, T: as in
    `upcast_fp8_kernel`. A program takes ROWS rows and BYTES bytes of codes. Grid (tiles of rows, K/(2*BYTES))."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    wait_inputs(PDL)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (r < rows)[:, None]
    r = tl.minimum(r, rows - 1)
    row = source_row(index, r, T).to(tl.int64)[:, None]
    r = r.to(tl.int64)[:, None]
    c = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    group = tl.program_id(1) * (2 * BYTES // G) + tl.arange(0, 2 * BYTES // G)
    w = tl.load(codes + row * (K // 2) + c[None, :], mask=(c < K // 2)[None, :], other=0)
    byte = tl.load(scales + row * (K // G) + group[None, :], mask=(group < K // G)[None, :], other=1).to(tl.int32)
    factor = e8m0_factor(byte) if FORMAT == "mxfp4" else e4m3_factor(byte)
    if SCALED:
        factor = factor * tl.div_rn(1.0, tl.load(g))
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, 2 * BYTES // G, G // 2)), (ROWS, BYTES))
    low, high = decode_bf16(w)
    # The bit pattern is the value times 2^-126. Two factors of 2^63 keep every intermediate result in fp32's range.
    low = low.to(tl.float32) * 9.223372036854775808e18 * 9.223372036854775808e18 * factor
    high = high.to(tl.float32) * 9.223372036854775808e18 * 9.223372036854775808e18 * factor
    if LANE_ORDER:
        # Permuted before the store, so that neighbours are stored at once.
        low = tl.reshape(low.to(tl.bfloat16), (ROWS, BYTES // 32, 4, 4, 2))
        low = tl.reshape(tl.permute(low, (0, 1, 3, 2, 4)), (ROWS, BYTES))
        high = tl.reshape(high.to(tl.bfloat16), (ROWS, BYTES // 32, 4, 4, 2))
        high = tl.reshape(tl.permute(high, (0, 1, 3, 2, 4)), (ROWS, BYTES))
        PITCH: tl.constexpr = (K + 127) // 128 * 128
        at = out + r * PITCH + (c // 64 * 128 + c % 64)[None, :]
        inside = inside & (c < PITCH // 2)[None, :]
        tl.store(at, low, mask=inside)
        tl.store(at + 64, high, mask=inside)
    else:
        k = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
        both = tl.reshape(tl.join(low, high), (ROWS, 2 * BYTES))
        tl.store(out + r * K + k[None, :], both.to(tl.bfloat16), mask=inside & (k < K)[None, :])
    start_next(PDL)


def _padded(k: int, lane_order: bool) -> int:
    return -(-k // 128) * 128 if lane_order else k


def upcast_fp8(
    codes: Tensor,
    scales: Tensor,
    g: Tensor | None,
    e4m3: bool,
    lane_order: bool = False,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """MXFP4 codes uint8 [rows, K/2] and scales uint8 [rows, K/32] -> (e4m3 or e5m2 [rows, K], unit fp32 [rows]).

    The channels are in one of `upcast_fp8_kernel`'s orders, in lane order filled up to a multiple of 128. The unit
    holds 1/g; g: fp32 [1], or bf16, a factor of each row of codes. index: int [rows], which row of codes and scales
    each row is made of."""
    rows, k = (codes if index is None else index).shape[0], 2 * codes.shape[1]
    out = torch.empty(
        (rows, _padded(k, lane_order)), dtype=torch.float8_e4m3fn if e4m3 else torch.float8_e5m2, device=codes.device
    )
    unit = torch.empty(rows, dtype=torch.float32, device=codes.device)
    row_groups, pdl = triton.next_power_of_2(k // 32), overlaps(codes.device.index)
    groups = max(4, min(row_groups, 128 if rows >= 512 else 32))  # few rows: several programs for each
    upcast_fp8_kernel[(rows, 1 if rows >= 512 else triton.cdiv(k // 32, groups))](
        codes.view(torch.int32),
        scales,
        g,
        unit,
        out.view(torch.int32),
        index,
        codes.shape[0],
        k,
        row_groups,
        e4m3,
        g is not None,
        groups,
        lane_order,
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out, unit


def upcast_both(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_global_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x e5m2 [M, K], its unit fp32 [M], w e4m3 [N, K], its unit fp32 [N]): `upcast_fp8` of both in one launch."""
    m, n, k, device = codes.shape[0], weight_codes.shape[0], 2 * codes.shape[1], codes.device
    x = torch.empty((m, k), dtype=torch.float8_e5m2, device=device)
    w = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=device)
    x_unit, w_unit = (torch.empty(size, dtype=torch.float32, device=device) for size in (m, n))
    row_groups, pdl = triton.next_power_of_2(k // 32), overlaps(device.index)
    upcast_both_kernel[(m + n,)](
        codes.view(torch.int32),
        scales,
        global_scale,
        x_unit,
        x.view(torch.int32),
        weight_codes.view(torch.int32),
        weight_scales,
        weight_global_scale,
        w_unit,
        w.view(torch.int32),
        m,
        k,
        row_groups,
        global_scale is not None,
        weight_global_scale is not None,
        min(row_groups, 128),
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return x, x_unit, w, w_unit


def upcast_bf16(
    codes: Tensor,
    scales: Tensor,
    g: Tensor | None,
    format: str,
    lane_order: bool = False,
    index: Tensor | None = None,
) -> Tensor:
    """Packed rows -> bf16 [rows, K], divided by g; exact if g is a power of two. `lane_order` as in the kernel, `index`
    as in `upcast_fp8`."""
    rows, k = (codes if index is None else index).shape[0], 2 * codes.shape[1]
    out = torch.empty((rows, _padded(k, lane_order)), dtype=torch.bfloat16, device=codes.device)
    block, pdl = 1 if rows <= 64 else 8, overlaps(codes.device.index)
    upcast_bf16_kernel[(triton.cdiv(rows, block), triton.cdiv(k, 1024))](
        codes,
        scales,
        g,
        out,
        index,
        rows,
        codes.shape[0],
        k,
        format,
        g is not None,
        block,
        512,
        lane_order,
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out


def upcast_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of 8 bits, codes [N, K] and scales bf16 [N, K/32], -> code · scale [N, K] in `dtype`."""
    (n, k), block_n, block_k = codes.shape, 16, 512
    out = torch.empty((n, k), dtype=dtype, device=codes.device)
    grid = triton.cdiv(n, block_n), triton.cdiv(k, block_k)
    int8_upcast_kernel[grid](codes.view(torch.int8), scales, out, n, k, block_n, block_k, num_warps=4)
    return out
