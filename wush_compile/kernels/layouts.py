"""Layouts of scales that devices want, defined in PyTorch; kernels that write them directly agree byte for byte.

Blackwell's block-scaled products read scales in tiles of 128 rows by 4 groups, 512 bytes each, row r and group c of a tile
at byte (r % 32)·16 + (r // 32)·4 + c; tiles follow each other along the groups first. Rows and groups are padded to whole
tiles with zero bytes (cuBLAS: "1D block scaling factors layout"; PyTorch: `SwizzleType.SWIZZLE_32_4_4` of
`torch.nn.functional.scaled_mm`).
"""

from torch import Tensor
from torch.nn import functional as F

TILE_ROWS, TILE_GROUPS = 128, 4


def swizzled_shape(rows: int, groups: int) -> tuple[int, int, int, int]:
    """Shape [⌈M/128⌉, ⌈S/4⌉, 32, 16] of the swizzled scales of M rows and S groups."""
    return -(-rows // TILE_ROWS), -(-groups // TILE_GROUPS), 32, 16


def swizzle_scales(scales: Tensor) -> Tensor:
    """uint8 [M, S] -> [⌈M/128⌉, ⌈S/4⌉, 32, 16], contiguous, padding written as 0."""
    rows, groups = scales.shape
    padded = F.pad(scales, (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(1, (-1, TILE_GROUPS)).unflatten(0, (-1, 4, 32))  # [M/128, 4, 32, S/4, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten(3).contiguous()


def unswizzle_scales(swizzled: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse: [⌈M/128⌉, ⌈S/4⌉, 32, 16] -> uint8 [M, S], without the padding."""
    tiles = swizzled.unflatten(3, (4, TILE_GROUPS)).permute(0, 3, 2, 1, 4)  # [M/128, 4, 32, S/4, 4]
    return tiles.flatten(0, 2).flatten(1)[:rows, :groups].contiguous()
