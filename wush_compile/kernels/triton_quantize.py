"""Block transform, quantization and packing in one Triton kernel (SPEC §2, §4, §6).

A program owns W columns and walks row tiles. The matrices of its W/B blocks form one block-diagonal [W, W] operand of a
single matrix product: the arithmetic on the zeros is free (the kernel is bound by memory), the loads stay wide, and the
operand stays on the chip from tile to tile.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS
from .triton_formats import (
    ABS_BITS, INF_BITS, MX_LIMIT, drop_bad, float_bits, group_amax, group_scales, pack_codes, store_bytes, store_codes,
    times_factor,
)
from .triton_launch import overlaps, start_next, wait_inputs


@triton.jit
def _load_operand(t, first, SHARED: tl.constexpr, B: tl.constexpr, W: tl.constexpr, K: tl.constexpr):
    """[W, W]: entry (k, n) is T_b[c, k] where column k and c, the output in column n, are of one block b, else 0.

    A tensor core leaves columns 8j + 2t and 8j + 2t + 1 of the product with lane t of four. Output (W/4)t + 2j + i is put into
    column 8j + 2t + i: so a lane has W/4 consecutive outputs, and what follows takes place within its registers."""
    k = tl.arange(0, W)
    n = tl.arange(0, W)
    c = (n // 2 % 4) * (W // 4) + n // 8 * 2 + n % 2
    inside = (k // B)[:, None] == (c // B)[None, :]
    if K % W != 0:
        inside = inside & (first + c < K)[None, :]
    offset = (c % B)[None, :] * B + (k % B)[:, None]
    if not SHARED:
        offset += ((first // B + c // B) * (B * B))[None, :]
    return tl.load(t + offset, mask=inside, other=0.0)


@triton.jit
def _dot(x, operand, WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
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
        y = _dot(tl.where(finite, x, 0.0).to(x.dtype), operand, WIDE, R, W)
        bad = tl.max(tl.reshape(tl.where(finite, 0, 1), (R, W // B, B)), axis=2)             # [R, W/B]
        bad = tl.reshape(tl.broadcast_to(bad[:, :, None], (R, W // B, B)), (R, W))
        y = tl.where(bad != 0, float("inf"), y)
    amax = group_amax(y, R, W, G)
    return drop_bad(y, amax, R, W, G), amax


@triton.jit
def _load_rows(x, rows, M, stride, first, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    columns = first + tl.arange(0, W)
    inside = (rows < M)[:, None]
    if K % W != 0:
        inside = inside & (columns < K)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(
    y, byte, factor, codes, scales, rows, M, first, K: tl.constexpr, GROUPED: tl.constexpr, CLIP: tl.constexpr,
    PTX: tl.constexpr, NATIVE: tl.constexpr, WORDS: tl.constexpr, R: tl.constexpr, W: tl.constexpr, G: tl.constexpr,
):
    """Codes and scale bytes of one tile. WORDS: 4-byte words of codes that a thread holds, 0 if not a constant of the
    layout; GROUPED: by the bytes alone (`store_codes`)."""
    row = rows.to(tl.int64)[:, None]
    inside = (rows < M)[:, None]
    groups = first // G + tl.arange(0, W // G)[None, :]
    into = scales + row * (K // G) + groups
    there = inside & (groups < K // G) if K % W != 0 else inside
    if WORDS > 0:
        words = first // 8 + tl.arange(0, W // 8)[None, :]
        y = y if GROUPED else times_factor(y, factor, R, W, G)
        whole = inside & (words < K // 8) if K % W != 0 else inside
        store_codes(codes + row * (K // 2) + words * 4, whole, y, byte, GROUPED, CLIP, PTX, NATIVE, WORDS, R, W)
        store_bytes(into, there, byte)
    else:
        columns = first // 2 + tl.arange(0, W // 2)[None, :]
        packed = pack_codes(times_factor(y, factor, R, W, G), PTX, NATIVE, R, W)
        tl.store(codes + row * (K // 2) + columns, packed, mask=inside & (columns < K // 2) if K % W != 0 else inside)
        tl.store(into, byte.to(tl.uint8), mask=there)


@triton.jit
def _tile(
    x, operand, g, codes, scales, rows, M, first, K: tl.constexpr, B: tl.constexpr, FORMAT: tl.constexpr,
    RULE: tl.constexpr, SCALED: tl.constexpr, PTX: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, WORDS: tl.constexpr, CLEAN: tl.constexpr,
):
    """Transform (B > 0), quantize and store one tile x [R, W]; returns the bits of the groups' absolute maxima. Right
    for results below the limit; CLEAN: for any."""
    MX: tl.constexpr = FORMAT == "mxfp4"
    G: tl.constexpr = 32 if MX else 16
    y = x.to(tl.float32)
    if B > 0:
        y = _dot(x, operand, WIDE, R, W)
    if CLEAN:
        y, amax = _clean(y, x, operand, WIDE, G, B, R, W)
        bad = amax >= INF_BITS
        byte, factor = group_scales(y, tl.where(bad, 0, amax), g, FORMAT, RULE, SCALED, PTX, R, W)
        byte = tl.where(bad, 255 if MX else 127, byte)
        _store(y, byte, factor, codes, scales, rows, M, first, K, False, True, PTX, NATIVE, 0, R, W, G)
    else:
        amax = group_amax(y, R, W, G, PTX)
        byte, factor = group_scales(y, amax, g, FORMAT, RULE, SCALED, PTX, R, W)
        _store(y, byte, factor, codes, scales, rows, M, first, K, MX and not SCALED, RULE != "absmax", PTX, NATIVE, WORDS, R,
               W, G)
    return amax


@triton.jit(do_not_specialize=["M"])
def transform_quantize_kernel(
    x, t, global_scale, codes, scales, M, stride, K: tl.constexpr, B: tl.constexpr, SHARED: tl.constexpr,
    FORMAT: tl.constexpr, RULE: tl.constexpr, SCALED: tl.constexpr, PTX: tl.constexpr, NATIVE: tl.constexpr,
    WIDE: tl.constexpr, R: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    WORDS: tl.constexpr, PDL: tl.constexpr,
):
    """x [M, K] (rows `stride` apart), t [K/B or 1, B, B] -> codes uint8 [M, K/2], scales uint8 [M, K/G]; grid
    (columns/W, rows/(R*TILES)). B = 0: no transform."""
    start_next(PDL)
    wait_inputs(PDL)
    first = tl.program_id(0) * W
    g = 1.0
    if SCALED:
        g = tl.load(global_scale)
    operand = 0.0
    if B > 0:
        operand = _load_operand(t, first, SHARED, B, W, K)
    start = tl.program_id(1) * (R * TILES)
    largest = tl.zeros((R, W // (32 if FORMAT == "mxfp4" else 16)), tl.int32)
    if TILES == 1:
        rows = start + tl.arange(0, R)
        tile = _load_rows(x, rows, M, stride, first, K, R, W)
        largest = _tile(tile, operand, g, codes, scales, rows, M, first, K, B, FORMAT, RULE, SCALED, PTX, NATIVE, WIDE,
                        R, W, WORDS, False)
    else:
        for i in tl.range(0, TILES, num_stages=STAGES):
            rows = start + i * R + tl.arange(0, R)
            tile = _load_rows(x, rows, M, stride, first, K, R, W)
            amax = _tile(tile, operand, g, codes, scales, rows, M, first, K, B, FORMAT, RULE, SCALED, PTX, NATIVE, WIDE,
                         R, W, WORDS, False)
            largest = tl.maximum(largest, amax)
    # NaN, Inf and huge values are rare: what they take is done in a second pass over the rows, which overwrites the first.
    limit: tl.constexpr = MX_LIMIT if FORMAT == "mxfp4" else INF_BITS
    if tl.max(tl.reshape(largest, (R * W // (32 if FORMAT == "mxfp4" else 16),)), axis=0) >= limit:
        tl.debug_barrier()
        for i in tl.range(0, TILES, num_stages=1):
            rows = start + i * R + tl.arange(0, R)
            tile = _load_rows(x, rows, M, stride, first, K, R, W)
            _tile(tile, operand, g, codes, scales, rows, M, first, K, B, FORMAT, RULE, SCALED, PTX, NATIVE, WIDE,
                  R, W, WORDS, True)


class Tile(NamedTuple):
    """Rows and columns of a tile, row tiles a program walks, depth of its load pipeline, warps."""

    rows: int
    columns: int
    tiles: int
    stages: int
    warps: int


def choose_tile(rows: int, width: int, block: int) -> Tile:
    """The tile for x [rows, width] with transform blocks of `block` (0: none)."""
    if block == 0:
        return Tile(1, 512, 1, 1, 2) if rows <= 4 else Tile(16, 256, 1, 1, 4)
    columns = max(64, block)
    if rows <= 64:
        return Tile(16, columns, 1, 1, 1 if block <= 64 else 4)
    if columns > 64:
        return Tile(64, columns, 1, 1, 4 if columns == 128 else 8)
    return Tile(64, 64, 4, 3, 4) if rows * width <= 2**24 else Tile(64, 64, 8, 3, 4)


def words(tile: Tile, cuda: bool, wide: bool, block: int, width: int) -> int:
    """How many 4-byte words of codes of one row a thread is known to hold side by side; 0 without a GPU."""
    if not cuda:
        return 0
    if block == 0 or wide or tile.rows < 16 * tile.warps:
        return 1
    return min(4 if width % 32 == 0 else 2, tile.columns // 32)


@functools.cache
def assembly(device: int) -> int:
    """Which instructions the kernel may use: 1 those of sm_80, 2 those of sm_86."""
    return 2 if torch.cuda.get_device_capability(device) >= (8, 6) else 1


@functools.cache
def native_conversion(device: int) -> bool:
    """Whether the device has the e2m1 conversion instruction (sm_100 and later, compiled for that very
    architecture)."""
    return torch.cuda.get_device_capability(device) >= (10, 0)


def transform_quantize(
    x: Tensor, transform: Tensor | None, global_scale: Tensor | None, format: str, scale_rule: str,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for mxfp4 and nvfp4 (SPEC §6); x bf16, fp16 or fp32, its last dimension dense."""
    width = x.shape[-1]
    group = FORMATS[format].group_size
    codes = torch.empty((*x.shape[:-1], width // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty((*x.shape[:-1], width // group), dtype=torch.uint8, device=x.device)
    rows = x.reshape(-1, width)
    if rows.numel() == 0:
        return codes, scales
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    block = 0 if transform is None else transform.shape[-1]
    wide = not x.is_cuda or x.dtype == torch.float32 or (transform is not None and transform.dtype != x.dtype)
    tile = tile or choose_tile(rows.shape[0], width, block)
    pdl = x.is_cuda and overlaps(x.device.index)
    grid = (triton.cdiv(width, tile.columns), triton.cdiv(rows.shape[0], tile.rows * tile.tiles))
    transform_quantize_kernel[grid](
        rows, transform if transform is None else transform.contiguous(), global_scale, codes, scales,
        rows.shape[0], rows.stride(0), width, block, block > 0 and transform.shape[0] == 1 and width > block,
        format, scale_rule, global_scale is not None, assembly(x.device.index) if x.is_cuda else 0,
        x.is_cuda and native_conversion(x.device.index), wide,
        tile.rows, tile.columns, tile.tiles, tile.stages, words(tile, x.is_cuda, wide, block, width), pdl, num_warps=tile.warps, enable_fp_fusion=False,
        **({"launch_pdl": True} if pdl else {}),
    )
    return codes, scales
