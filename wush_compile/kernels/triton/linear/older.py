"""Tiles of `fused` on Ampere and Ada, both operands in bf16, by counting. **No run on such a GPU has confirmed them.**

Counted is what limits the programs that share a multiprocessor, shared memory and registers, in the code that Triton
makes for sm_80, sm_86 and sm_89 (tests/test_lowering.py compares); from that and the device's multiprocessors the
waves, and so the parts of K that take least."""

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """As `choose.Fused`; bytes of shared memory of a program, registers of a thread."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    shared: int
    registers: int


# Most rows -> tile. A step of 128 channels takes every width; more stages than these do not fit sm_86 twice, and for
# 128 rows not once. Hopper's tile for 128 rows, of 64 weight rows and 4 warps, would keep registers in memory.
TILES = {
    16: Tile(64, 16, 128, 4, 4, 26624, 96),
    32: Tile(64, 32, 128, 4, 4, 38912, 112),
    64: Tile(64, 64, 128, 4, 3, 41984, 152),
    128: Tile(128, 128, 128, 8, 3, 83968, 184),
}
MOST_ROWS = max(TILES)  # the library multiplies more
# KiB of shared memory of a multiprocessor; a program may have 1 KiB less, and takes 1 KiB more than it asks for.
SHARED_KIB = {(8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100}
REGISTERS = 65536  # of a multiprocessor
MOST_PARTS = 8


def resident(tile: Tile, capability: tuple[int, int]) -> int:
    """Programs that share a multiprocessor."""
    shared = SHARED_KIB.get(capability, 100) * 1024 // (tile.shared + 1024)
    return max(1, min(shared, REGISTERS // (tile.registers * 32 * tile.warps)))


def cost(tile: Tile, parts: int, rows: int, n: int, k: int, slots: int) -> float:
    """Steps that the product takes, with so many parts of K and room for `slots` programs: waves times the steps of a
    part, the filling of its pipeline, and what it costs to hand on its sums, by their bytes over those of a step."""
    programs = -(-n // tile.block_n) * -(-rows // tile.block_m) * parts
    step = tile.block_k * (tile.block_n // 2 + 2 * tile.block_m)
    sums = 2 * 4 * tile.block_n * tile.block_m / step if parts > 1 else 0.0
    return math.ceil(programs / slots) * (k // tile.block_k / parts + tile.stages - 1 + sums)


def fused(rows: int, n: int, k: int, capability: tuple[int, int], multiprocessors: int) -> tuple[Tile, int] | None:
    """(tile, parts of K) for [rows, k] times [n, k], k a multiple of 128; None for more rows than `MOST_ROWS`."""
    tile = next((tile for most, tile in TILES.items() if rows <= most), None)
    if tile is None:
        return None
    slots, steps = multiprocessors * resident(tile, capability), k // tile.block_k
    parts = [p for p in range(1, MOST_PARTS + 1) if steps % p == 0]
    return tile, min(parts, key=lambda p: cost(tile, p, rows, n, k, slots))
