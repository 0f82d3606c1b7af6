"""Tiles by the shape of x, and instructions by the device. Pure Python without a kernel; runs once a launch.

The thresholds come from runs of `python benchmarks/speed_quantize_kernel.py tune` on one H100, for the shapes in that
script. The output of those runs was not kept.
"""

import functools
from typing import NamedTuple

import torch

MOST_ROWS = 1024  # of a program: offsets within a program are int32


class Tile(NamedTuple):
    """Rows and columns of a tile, row tiles that a program walks, depth of the load pipeline, warps."""

    rows: int
    columns: int
    tiles: int
    stages: int
    warps: int


def choose_tile(rows: int, width: int, block: int, feeds_back: bool = False) -> Tile:
    """The tile for x [rows, width] with transform blocks of `block` channels (0: no transform).

    Rounding with feedback takes 64 columns or more: in fewer a thread does not hold the values of all steps."""
    if block == 0:
        if rows <= 4:
            return Tile(1, 512, 1, 1, 2)
        return Tile(4, 512, 1, 1, 2) if rows * width <= 2**20 else Tile(4, 1024, 1, 1, 4)
    columns = max(64, block)
    if rows <= 64:
        return Tile(16, max(32, block) if rows <= 16 and not feeds_back else columns, 1, 1, 1 if block <= 64 else 4)
    if columns > 64:
        return Tile(64, columns, 1, 1, 4 if columns == 128 else 8)
    return Tile(64, 64, 1, 1, 4) if rows * width <= 2**22 else Tile(64, 64, 6, 4, 4)


def words(tile: Tile, fp32_dot: bool, block: int, width: int) -> int:
    """Number of neighbouring 4-byte words of codes that a thread holds and stores at once, on a GPU."""
    if block == 0 or fp32_dot or tile.rows < 16 * tile.warps:
        return 1
    return min(4 if width % 32 == 0 else 2, tile.columns // 32)


def instructions(capability: tuple[int, int]) -> int:
    """The newest instruction set with something that the quantizer uses, for a GPU of that compute capability:

    80    Triton's own minimum
    86    `min` and `max` with the sign of one operand (xorsign)
    89    conversion to e4m3
    100   conversion to e2m1; the kernel must be compiled for that very architecture
    """
    return next(level for level in (100, 89, 86, 80) if capability >= divmod(level, 10) or level == 80)


@functools.cache
def device_instructions(device: int) -> int:
    """`instructions` of a CUDA device."""
    return instructions(torch.cuda.get_device_capability(device))
