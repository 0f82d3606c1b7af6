"""What the quantizer's kernel is compiled for: a tile by the shape of x, instructions by the device. Pure Python, and no
kernel: chosen once a launch, measured by `benchmarks/speed_quantize_kernel.py`."""

import functools
from typing import NamedTuple

import torch

MOST_ROWS = 1024  # of a program: offsets within it are int32


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
        if rows <= 4:
            return Tile(1, 512, 1, 1, 2)
        return Tile(4, 512, 1, 1, 2) if rows * width <= 2**20 else Tile(4, 1024, 1, 1, 4)
    columns = max(64, block)
    if rows <= 64:
        return Tile(16, max(32, block) if rows <= 16 else columns, 1, 1, 1 if block <= 64 else 4)
    if columns > 64:
        return Tile(64, columns, 1, 1, 4 if columns == 128 else 8)
    return Tile(64, 64, 1, 1, 4) if rows * width <= 2**22 else Tile(64, 64, 6, 4, 4)


def words(tile: Tile, cuda: bool, wide: bool, block: int, width: int) -> int:
    """How many 4-byte words of codes a thread holds side by side, which it then stores at once; 0 without a GPU."""
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
