"""Block transform, quantization and packing in one Triton kernel (SPEC §2, §4, §6).

A program owns W columns and walks row tiles. The matrices of its W/B blocks form one block-diagonal [W, W] operand of a
single matrix product: the arithmetic on the zeros is free (the kernel is bound by memory), the loads stay wide, and the
operand stays on the chip from tile to tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import FORMATS
from ....ops.layouts import swizzled_shape
from ..common.formats import (
    ABS_BITS,
    INF_BITS,
    MX_LIMIT,
    drop_bad,
    float_bits,
    group_amax,
    group_scales,
    pack_codes,
    store_bytes,
    store_codes,
    times_factor,
)
from ..common.overlap import overlaps, start_next, wait_arrivals, wait_inputs
from .prologue import Prologue, gated, normed
from .tiles import MOST_ROWS, Tile, assembly, choose_tile, native_conversion, words


@triton.jit
def prefetch(pointers, PTX: tl.constexpr):
    """Asks for the cache lines that hold these addresses; nothing is read."""
    if PTX:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_operand(
    t,
    first,
    SHARED: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """[W, W]: entry (k, n) is T_b[c, k] where column k and c, the output in column n, are of one block b, else 0.

    A tensor core leaves columns 8j + 2t and 8j + 2t + 1 of the product with lane t of four. Output (W/4)t + 2j + i is
    put into column 8j + 2t + i: so a lane has W/4 consecutive outputs, and what follows takes place in its registers.
    """
    k = tl.arange(0, W)
    n = tl.arange(0, W)
    c = (n // 2 % 4) * (W // 4) + n // 8 * 2 + n % 2
    inside = (k // B)[:, None] == (c // B)[None, :]
    if not EVEN:
        inside = inside & (first + c < K)[None, :]
    offset = (c % B)[None, :] * B + (k % B)[:, None]
    if not SHARED:
        offset += ((first // B + c // B) * (B * B))[None, :]
    return tl.load(t + offset, mask=inside, other=0.0)


@triton.jit
def dot(x, operand, WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """fp32 x @ operand, its columns in the order of the outputs. WIDE: in fp32 throughout, for fp32 inputs and for the
    interpreter, whose bf16 dot is wrong."""
    if WIDE:
        y = tl.dot(x.to(tl.float32), operand.to(tl.float32), input_precision="ieee")
    else:
        y = tl.dot(x, operand)
    return tl.reshape(tl.permute(tl.reshape(y, (R, W // 8, 4, 2)), (0, 2, 1, 3)), (R, W))


@triton.jit
def _clean(y, x, operand, WIDE: tl.constexpr, G: tl.constexpr, B: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """(y, group_amax of it before), y with zeros in groups that are not finite. In the shared product a NaN or Inf
    would reach the other blocks of its row (0 * NaN): the product is computed again from the finite values, and the
    blocks that had others are marked."""
    if B > 0 and W > B:
        finite = (float_bits(x.to(tl.float32)) & ABS_BITS) < INF_BITS
        y = dot(tl.where(finite, x, 0.0).to(x.dtype), operand, WIDE, R, W)
        bad = tl.max(tl.reshape(tl.where(finite, 0, 1), (R, W // B, B)), axis=2)  # [R, W/B]
        bad = tl.reshape(tl.broadcast_to(bad[:, :, None], (R, W // B, B)), (R, W))
        y = tl.where(bad != 0, float("inf"), y)
    amax = group_amax(y, R, W, G)
    return drop_bad(y, amax, R, W, G), amax


@triton.jit
def _inside(rows, left, columns, K: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr):
    """Which elements of a tile there are, None if all: rows [R, 1] of `left`, columns [1, C] of K, all if EVEN."""
    inside = None
    if MASKED:
        inside = rows < left
    if not EVEN:
        inside = columns < K if inside is None else inside & (columns < K)
    return inside


@triton.jit
def load_rows(
    x,
    row,
    left,
    stride,
    first,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    OTHER: tl.constexpr = 0.0,
):
    """Rows `row` + 0..R of what x points to, columns `first` + 0..W; OTHER where there is none: 1 for gates, since the
    division in SiLU takes its slow path for zeros."""
    rows = row + tl.arange(0, R)[:, None]
    columns = tl.arange(0, W)[None, :]
    inside = _inside(rows, left, first + columns, K, MASKED, EVEN)
    pointers = x + (rows * stride + columns)
    return tl.load(pointers, mask=inside, other=None if inside is None else OTHER)


@triton.jit
def _prologue(
    tile,
    source,
    row,
    left,
    first,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """What PROLOGUE makes of a tile of x and its other operands."""
    x, up, weight, bias, mean, scale, stride, up_stride = source
    if PROLOGUE is not None:
        if up is not None:
            tile = gated(tile, load_rows(up, row, left, up_stride, first, K, R, W, MASKED, EVEN), PROLOGUE)
        else:
            rows = row + tl.arange(0, R)[:, None]
            inside = _inside(rows, left, 0, K, MASKED, True)
            if mean is not None:
                if mean.dtype.is_ptr():
                    mean = tl.load(mean + rows, mask=inside, other=None if inside is None else 0.0)
            if scale.dtype.is_ptr():
                scale = tl.load(scale + rows, mask=inside, other=None if inside is None else 0.0)
            tile = normed(tile, mean, scale, weight, bias, PROLOGUE)
    return tile


@triton.jit
def _load_tile(
    source,
    row,
    left,
    first,
    K: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """The tile that is transformed and quantized: of x, or what PROLOGUE makes of it."""
    OTHER: tl.constexpr = 0.0 if source[1] is None else 1.0
    tile = load_rows(source[0], row, left, source[6], first, K, R, W, MASKED, EVEN, OTHER)
    return _prologue(tile, source, row, left, first, K, R, W, MASKED, EVEN, PROLOGUE)


@triton.jit
def _store_scales(
    scales,
    byte,
    row,
    left,
    shift,
    first,
    K: tl.constexpr,
    G: tl.constexpr,
    PTX: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    SWIZZLED: tl.constexpr,
):
    """Scale bytes of one tile, int32 [R, W/G], to rows of K/G; or SWIZZLED, as `layouts.swizzle_scales`, with the
    padding that lies in the tile; then `scales` points `shift` rows before row 0."""
    N: tl.constexpr = K // G
    rows = row + tl.arange(0, R)[:, None]
    groups = first // G + tl.arange(0, W // G)[None, :]
    if SWIZZLED:
        WIDE: tl.constexpr = (N + 3) // 4 * 4
        EVEN: tl.constexpr = WIDE == N and N % (W // G) == 0
        there = _inside(rows, left, groups, N, MASKED, EVEN)
        if there is not None:
            byte = tl.where(there, byte, 0)
        rows += shift
        offset = rows // 128 * (WIDE * 128) + rows % 32 * 16 + rows // 32 % 4 * 4 + groups // 4 * 512 + groups % 4
        there = _inside(rows, tl.cdiv(left + shift, 128) * 128, groups, WIDE, MASKED, EVEN)
    else:
        offset = rows * N + tl.arange(0, W // G)[None, :]
        there = _inside(rows, left, groups, N, MASKED, N % (W // G) == 0)
    if PTX:
        store_bytes(scales + offset, there, byte)
    else:
        tl.store(scales + offset, byte.to(tl.uint8), mask=there)


@triton.jit
def _store_values(
    codes,
    y,
    byte,
    factor,
    row,
    left,
    first,
    K: tl.constexpr,
    GROUPED: tl.constexpr,
    MOST: tl.constexpr,
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WORDS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes of one tile. WORDS: how many 4-byte words of them a store takes, 0: stored by Triton, as in packages;
    GROUPED: by the bytes alone (`store_codes`)."""
    rows = row + tl.arange(0, R)[:, None]
    if WORDS > 0:
        chunks = tl.arange(0, W // (8 * WORDS))[None, :]
        y = y if GROUPED else times_factor(y, factor, R, W, G)
        there = _inside(rows, left, first // (8 * WORDS) + chunks, K // (8 * WORDS), MASKED, EVEN)
        pointers = codes + (rows * (K // 2) + chunks * (4 * WORDS))
        store_codes(pointers, there, y, byte, GROUPED, MOST, PTX, NATIVE, WORDS, R, W)
    else:
        columns = tl.arange(0, W // 2)[None, :]
        packed = pack_codes(times_factor(y, factor, R, W, G), PTX, NATIVE, R, W)
        tl.store(
            codes + (rows * (K // 2) + columns),
            packed,
            mask=_inside(rows, left, first // 2 + columns, K // 2, MASKED, EVEN),
        )


@triton.jit
def _tile(
    x,
    operand,
    g,
    codes,
    scales,
    row,
    left,
    shift,
    first,
    K: tl.constexpr,
    B: tl.constexpr,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    WORDS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    CLEAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Transform (B > 0), quantize and store one tile x [R, W]; returns the bits of the groups' absolute maxima. Right
    while these are below the kernel's limit; CLEAN: for any."""
    MX: tl.constexpr = FORMAT == "mxfp4"
    G: tl.constexpr = 32 if MX else 16
    EVEN: tl.constexpr = K % W == 0 and not (SWIZZLED and K // G % 4 != 0)
    y = x.to(tl.float32)
    if B > 0:
        y = dot(x, operand, WIDE, R, W)
    if CLEAN:
        y, amax = _clean(y, x, operand, WIDE, G, B, R, W)
        bad = amax >= INF_BITS
        byte, factor = group_scales(y, tl.where(bad, 0, amax), g, FORMAT, RULE, SCALED, 0, R, W)
        byte = tl.where(bad, 255 if MX else 127, byte)
        _store_values(codes, y, byte, factor, row, left, first, K, False, 0, PTX, NATIVE, 0, R, W, G, MASKED, EVEN)
    else:
        amax = group_amax(y, R, W, G, PTX)
        byte, factor = group_scales(y, amax, g, FORMAT, RULE, SCALED, PTX, R, W)
        MOST: tl.constexpr = 0 if MX and SCALED else 6 if MX and RULE == "absmax" else 10
        _store_values(
            codes,
            y,
            byte,
            factor,
            row,
            left,
            first,
            K,
            MX and not SCALED and PTX > 0,
            MOST,
            PTX,
            NATIVE,
            WORDS,
            R,
            W,
            G,
            MASKED,
            EVEN,
        )
    _store_scales(scales, byte, row, left, shift, first, K, G, PTX if WORDS > 0 else 0, R, W, MASKED, SWIZZLED)
    return amax


@triton.jit
def quantize_rows(
    program,
    arrivals,
    x,
    up,
    weight,
    bias,
    mean,
    scale,
    t,
    global_scale,
    codes,
    scales,
    M,
    pitch,
    up_pitch,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    B: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WORDS: tl.constexpr,
):
    """What program number `program` of `transform_quantize_kernel` does. A norm's statistics: pointers to those of all
    rows, to be read after `arrivals` (`triton_launch.wait_arrivals`) unless that is None; or tiles [R, 1]."""
    G: tl.constexpr = 32 if FORMAT == "mxfp4" else 16
    N: tl.constexpr = (K // G + 3) // 4 * 4 if SWIZZLED else K // G  # scales in a row
    COLUMNS: tl.constexpr = (N * G + W - 1) // W
    EVEN: tl.constexpr = K % W == 0 and N * G == K
    stride = STRIDE if STRIDE > 0 else pitch
    first = program % COLUMNS * W
    start = program // COLUMNS * (R * TILES)
    left = M - start
    row = start.to(tl.int64)
    x += row * stride + first
    if up is not None:
        up += row * up_pitch + first
    if mean is not None:
        if mean.dtype.is_ptr():
            mean += start
    if scale is not None:
        if scale.dtype.is_ptr():
            scale += start
    codes += row * (K // 2) + first // 2
    shift = 0
    if SWIZZLED:
        shift = start % 128 if R * TILES % 128 != 0 else 0
        scales += (row - shift) * N
    else:
        scales += row * N + first // G
    columns = first + tl.arange(0, W)[None, :]
    if weight is not None:
        weight = tl.load(weight + columns, mask=columns < K, other=0.0)
    if bias is not None:
        bias = tl.load(bias + columns, mask=columns < K, other=0.0)
    source = (x, up, weight, bias, mean, scale, stride, up_pitch)
    g = tl.full((), 1.0, tl.float32)
    if SCALED:
        g = tl.load(global_scale)
    if TILES > 1 and EVEN:
        # The first rows travel while the matrices do.
        prefetch(x + tl.minimum(tl.arange(0, 2 * R), left - 1) * stride, PTX)
    operand = 0.0
    if B > 0:
        operand = load_operand(t, first, SHARED, B, W, K, EVEN)
    # NaN, Inf, huge values and saturated scales are rare: what they take is done in a second pass over the rows, which
    # overwrites the first.
    limit = MX_LIMIT
    if FORMAT == "nvfp4":
        limit = tl.minimum(float_bits(2680.0 / g), INF_BITS)
    if TILES == 1:
        tile = load_rows(x, 0, left, stride, first, K, R, W, True, EVEN, 0.0 if up is None else 1.0)
        if arrivals is not None:
            wait_arrivals(arrivals)
        tile = _prologue(tile, source, 0, left, first, K, R, W, True, EVEN, PROLOGUE)
        largest = _tile(
            tile,
            operand,
            g,
            codes,
            scales,
            0,
            left,
            shift,
            first,
            K,
            B,
            FORMAT,
            RULE,
            SCALED,
            PTX,
            NATIVE,
            WIDE,
            R,
            W,
            WORDS,
            SWIZZLED,
            False,
            True,
        )
        if tl.max(tl.reshape(largest, (R * W // G,)), axis=0) >= limit:
            tl.debug_barrier()
            tile = _load_tile(source, 0, left, first, K, R, W, True, EVEN, PROLOGUE)
            _tile(
                tile,
                operand,
                g,
                codes,
                scales,
                0,
                left,
                shift,
                first,
                K,
                B,
                FORMAT,
                RULE,
                SCALED,
                PTX,
                NATIVE,
                WIDE,
                R,
                W,
                WORDS,
                SWIZZLED,
                True,
                True,
            )
    else:
        if arrivals is not None:
            wait_arrivals(arrivals)
        # Whole tiles need no masks; what is left of the rows is treated with the exceptions.
        done = tl.minimum(left // R, TILES)
        largest = tl.zeros((R, W // G), tl.int32)
        for i in tl.range(0, done, num_stages=STAGES):
            tile = _load_tile(source, i * R, left, first, K, R, W, False, EVEN, PROLOGUE)
            amax = _tile(
                tile,
                operand,
                g,
                codes,
                scales,
                i * R,
                left,
                shift,
                first,
                K,
                B,
                FORMAT,
                RULE,
                SCALED,
                PTX,
                NATIVE,
                WIDE,
                R,
                W,
                WORDS,
                SWIZZLED,
                False,
                False,
            )
            largest = tl.maximum(largest, amax)
        if tl.max(tl.reshape(largest, (R * W // G,)), axis=0) >= limit:
            done = 0
            tl.debug_barrier()
        end = tl.cdiv(left + shift, 128) * 128 - shift if SWIZZLED else left
        for i in tl.range(done, tl.minimum(tl.cdiv(end, R), TILES), num_stages=1):
            tile = _load_tile(source, i * R, left, first, K, R, W, True, EVEN, PROLOGUE)
            _tile(
                tile,
                operand,
                g,
                codes,
                scales,
                i * R,
                left,
                shift,
                first,
                K,
                B,
                FORMAT,
                RULE,
                SCALED,
                PTX,
                NATIVE,
                WIDE,
                R,
                W,
                WORDS,
                SWIZZLED,
                True,
                True,
            )


@triton.jit(do_not_specialize=["M"])
def transform_quantize_kernel(
    x,
    up,
    weight,
    bias,
    mean,
    scale,
    t,
    global_scale,
    codes,
    scales,
    M,
    pitch,
    up_pitch,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    B: tl.constexpr,
    SHARED: tl.constexpr,
    FORMAT: tl.constexpr,
    RULE: tl.constexpr,
    SCALED: tl.constexpr,
    SWIZZLED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PTX: tl.constexpr,
    NATIVE: tl.constexpr,
    WIDE: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    WORDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [M, K], its rows STRIDE apart (0: `pitch`), t [K/B or 1, B, B] -> codes uint8 [M, K/2], scales uint8 [M, K/G].
    A program takes W columns and R*TILES rows; neighbours take the next columns. B = 0: no transform.

    PROLOGUE: None, or what is done to x first (`triton_prologue`); `up` [M, K], rows `up_pitch` apart, and the vectors
    of a norm are None where it has none."""
    wait_inputs(PDL)
    start_next(PDL)
    quantize_rows(
        tl.program_id(0),
        None,
        x,
        up,
        weight,
        bias,
        mean,
        scale,
        t,
        global_scale,
        codes,
        scales,
        M,
        pitch,
        up_pitch,
        K,
        STRIDE,
        B,
        SHARED,
        FORMAT,
        RULE,
        SCALED,
        SWIZZLED,
        PROLOGUE,
        PTX,
        NATIVE,
        WIDE,
        R,
        W,
        TILES,
        STAGES,
        WORDS,
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
    swizzled: bool = False,
) -> tuple[Tensor, Tensor, dict]:
    """(codes, scales) to be written for x, and the arguments, by name, that every kernel with `quantize_rows` takes;
    rows = dense_rows(x)."""
    count, width = rows.shape
    groups = width // FORMATS[format].group_size
    codes = torch.empty((*x.shape[:-1], width // 2), dtype=torch.uint8, device=x.device)
    shape = swizzled_shape(count, groups) if swizzled else (*x.shape[:-1], groups)
    scales = torch.empty(shape, dtype=torch.uint8, device=x.device)
    block = 0 if transform is None else transform.shape[-1]
    wide = not x.is_cuda or x.dtype == torch.float32 or (transform is not None and transform.dtype != x.dtype)
    pdl = x.is_cuda and overlaps(x.device.index)
    return (
        codes,
        scales,
        dict(
            x=rows,
            t=transform if transform is None else transform.contiguous(),
            global_scale=global_scale,
            codes=codes,
            scales=scales,
            M=count,
            pitch=rows.stride(0),
            K=width,
            STRIDE=width if rows.stride(0) == width else 0,
            B=block,
            SHARED=block > 0 and transform.shape[0] == 1 and width > block,
            FORMAT=format,
            RULE=scale_rule,
            SCALED=global_scale is not None,
            SWIZZLED=swizzled,
            PTX=assembly(x.device.index) if x.is_cuda else 0,
            NATIVE=x.is_cuda and native_conversion(x.device.index),
            WIDE=wide,
            R=tile.rows,
            W=tile.columns,
            TILES=tile.tiles,
            STAGES=tile.stages,
            WORDS=words(tile, x.is_cuda, wide, block, width),
            PDL=pdl,
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
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for mxfp4 and nvfp4 (SPEC §6); x bf16, fp16 or fp32, its last dimension dense.

    swizzled: the scales, of all rows, as `layouts.swizzle_scales` has them, padding written."""
    rows = dense_rows(x)
    count, width = rows.shape
    tile = tile or choose_tile(count, width, 0 if transform is None else transform.shape[-1])
    codes, scales, arguments = prepare(x, rows, transform, global_scale, format, scale_rule, tile, swizzled)
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
        up_pitch=0 if up is None else up.stride(0),
        PROLOGUE=prologue.name,
        **arguments,
    )
    return codes, scales
