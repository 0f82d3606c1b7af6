"""How the scales of activations lie in memory: `scale_layout` of the ops.

Kernels agree with these functions byte for byte.

    rows       [.., S], a row of S = K/G scales for each row of codes; every device reads it
    swizzled   [⌈M/128⌉, ⌈S/4⌉, 32, 16] for all M rows together: what Blackwell's block-scaled products read

A swizzled tile holds 128 rows by 4 groups in 512 bytes: row r and group c of a tile lie at byte
(r % 32)·16 + (r // 32)·4 + c. Tiles follow each other along the groups first. Rows and groups are padded to whole tiles
with zero bytes (cuBLAS: "1D block scaling factors layout"; PyTorch: `SwizzleType.SWIZZLE_32_4_4` of
`torch.nn.functional.scaled_mm`).
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

SCALE_LAYOUTS = ("rows", "swizzled")
TILE_ROWS, TILE_GROUPS = 128, 4


def swizzled_shape(rows: int, groups: int) -> tuple[int, int, int, int]:
    """Shape [⌈M/128⌉, ⌈S/4⌉, 32, 16] of the swizzled scales of M rows and S groups."""
    return -(-rows // TILE_ROWS), -(-groups // TILE_GROUPS), 32, 16


def swizzle_scales(scales: Tensor) -> Tensor:
    """[M, S] -> [⌈M/128⌉, ⌈S/4⌉, 32, 16], contiguous, padding written as 0."""
    rows, groups = scales.shape
    padded = F.pad(scales, (0, -groups % TILE_GROUPS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(1, (-1, TILE_GROUPS)).unflatten(0, (-1, 4, 32))  # [M/128, 4, 32, S/4, 4]
    return tiles.permute(0, 3, 2, 1, 4).flatten(3).contiguous()


def unswizzle_scales(swizzled: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse: [⌈M/128⌉, ⌈S/4⌉, 32, 16] -> [M, S], without the padding."""
    tiles = swizzled.unflatten(3, (4, TILE_GROUPS)).permute(0, 3, 2, 1, 4)  # [M/128, 4, 32, S/4, 4]
    return tiles.flatten(0, 2).flatten(1)[:rows, :groups].contiguous()


def scale_shape(lead: Sequence[int], groups: int, scale_layout: str) -> tuple[int, ...]:
    """Shape of the scales of rows [*lead] with this many groups each; ValueError for an unknown layout."""
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"scale layout {scale_layout!r} is not one of {', '.join(SCALE_LAYOUTS)}")
    return (*lead, groups) if scale_layout == "rows" else swizzled_shape(math.prod(lead), groups)


def lay_out(scales: Tensor, scale_layout: str) -> Tensor:
    """Scales in rows [.., S] -> the same in this layout."""
    return scales if scale_layout == "rows" else swizzle_scales(scales.reshape(-1, scales.shape[-1]))


def in_rows(scales: Tensor, lead: Sequence[int], groups: int, scale_layout: str) -> Tensor:
    """The inverse of `lay_out`: scales in this layout -> rows [*lead, S]."""
    if scale_layout == "rows":
        return scales
    return unswizzle_scales(scales, math.prod(lead), groups).view(*lead, groups)


def rows_only(scale_layout: str) -> None:
    """ValueError unless scales are in rows: for kernels that know no other layout."""
    if scale_layout != "rows":
        raise ValueError(f"this kernel takes scales in rows, not {scale_layout}")
