"""Codes and scales of one tile to memory."""

import triton
import triton.language as tl

from ..common.formats import times_factor
from .codes import pack_codes, store_bytes, store_codes
from .load import inside_mask


@triton.jit
def store_scales(scales, byte, row, left, shift, first, SPEC: tl.constexpr, MASKED: tl.constexpr):
    """Scale bytes of one tile, int32 [R, W/G], to rows of K/G; or, if swizzled, in the order of
    `layouts.swizzle_scales`, with the padding that lies in the tile. Then `scales` points `shift` rows before
    row 0."""
    N: tl.constexpr = SPEC.width // SPEC.group
    COLUMNS: tl.constexpr = SPEC.columns // SPEC.group
    rows = row + tl.arange(0, SPEC.rows)[:, None]
    groups = first // SPEC.group + tl.arange(0, COLUMNS)[None, :]
    if SPEC.swizzled:
        PADDED: tl.constexpr = (N + 3) // 4 * 4
        EVEN: tl.constexpr = PADDED == N and N % COLUMNS == 0
        there = inside_mask(rows, left, groups, N, MASKED, EVEN)
        if there is not None:
            byte = tl.where(there, byte, 0)
        rows += shift
        offset = rows // 128 * (PADDED * 128) + rows % 32 * 16 + rows // 32 % 4 * 4 + groups // 4 * 512 + groups % 4
        there = inside_mask(rows, tl.cdiv(left + shift, 128) * 128, groups, PADDED, MASKED, EVEN)
    else:
        offset = rows * N + tl.arange(0, COLUMNS)[None, :]
        there = inside_mask(rows, left, groups, N, MASKED, N % COLUMNS == 0)
    if SPEC.words > 0 and SPEC.sm > 0:
        store_bytes(scales + offset, there, byte)
    else:
        tl.store(scales + offset, byte.to(tl.uint8), mask=there)


@triton.jit
def store_values(
    codes,
    y,
    byte,
    factor,
    row,
    left,
    first,
    SPEC: tl.constexpr,
    WORDS: tl.constexpr,
    BY_GROUP: tl.constexpr,
    MOST: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Codes of one tile y fp32 [R, W]. WORDS: 4-byte words of codes in one store by assembly; 0: Triton stores them, as
    packages need. BY_GROUP, MOST: as `store_codes`."""
    K: tl.constexpr = SPEC.width
    R: tl.constexpr = SPEC.rows
    W: tl.constexpr = SPEC.columns
    rows = row + tl.arange(0, R)[:, None]
    if WORDS > 0:
        chunks = tl.arange(0, W // (8 * WORDS))[None, :]
        y = y if BY_GROUP else times_factor(y, factor, R, W, SPEC.group)
        there = inside_mask(rows, left, first // (8 * WORDS) + chunks, K // (8 * WORDS), MASKED, EVEN)
        pointers = codes + (rows * (K // 2) + chunks * (4 * WORDS))
        store_codes(pointers, there, y, byte, BY_GROUP, MOST, SPEC.sm, WORDS, R, W)
    else:
        columns = tl.arange(0, W // 2)[None, :]
        packed = pack_codes(times_factor(y, factor, R, W, SPEC.group), SPEC.sm, R, W)
        tl.store(
            codes + (rows * (K // 2) + columns),
            packed,
            mask=inside_mask(rows, left, first // 2 + columns, K // 2, MASKED, EVEN),
        )
