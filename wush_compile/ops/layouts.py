"""How activations lie in memory between quantizers and products: `scale_layout` of the ops.

Kernels agree with these functions byte for byte.

    rows       [.., S], a row of S = K/G scales for each row of codes; every device reads it
    swizzled   [⌈M/128⌉, ⌈S/4⌉, 32, 16] for all M rows together: what Blackwell's block-scaled products read
    lanes      what Hopper's products read beside the weights that they decode: the codes of every 128 channels in their
               order (`lane_channels`). fp8, none: the same codes and scales as in rows. nvfp4: the values in bf16
               [.., K], which holds them exactly, and no scales [.., 0]

A swizzled tile holds 128 rows by 4 groups in 512 bytes: row r and group c of a tile lie at byte
(r % 32)·16 + (r // 32)·4 + c. Tiles follow each other along the groups first. Rows and groups are padded to whole tiles
with zero bytes (cuBLAS: "1D block scaling factors layout"; PyTorch: `SwizzleType.SWIZZLE_32_4_4` of
`torch.nn.functional.scaled_mm`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import formats

SCALE_LAYOUTS = ("rows", "swizzled", "lanes")
TILE_ROWS, TILE_GROUPS = 128, 4
PANEL = 128  # channels that are put in order together


def lane_channels(format: str, device: torch.device | None = None) -> Tensor:
    """int64 [128]: which channel of 128 stands at each place of the layout `lanes`; format fp8 or none.

    A lane of four decodes 8 weights at once. fp8: the channels 0..3 of every 8 come first, then the channels 4..7;
    none: the even channels come first, then the odd ones. In either half a lane's fours (twos) lie 4 places of such
    apart."""
    o = torch.arange(PANEL, device=device)
    if format == "fp8":
        return o % 16 // 4 * 32 + o % 64 // 16 * 8 + o // 64 * 4 + o % 4
    return 2 * (o // 32 % 2 * 32 + o // 2 % 4 * 8 + o // 8 % 4 * 2 + o % 2) + o // 64


def _permuted(codes: Tensor, order: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, PANEL))[..., order].flatten(-2)


def to_lanes(codes: Tensor, format: str) -> Tensor:
    """Codes [.., K] of fp8 or none, K a multiple of 128 -> the same in the layout `lanes`."""
    return _permuted(codes, lane_channels(format, codes.device))


def from_lanes(codes: Tensor, format: str) -> Tensor:
    """The inverse of `to_lanes`."""
    return _permuted(codes, lane_channels(format, codes.device).argsort())


def operand_of(format: str, width: int, dtype: torch.dtype, layout: str) -> tuple[int, torch.dtype, int, torch.dtype]:
    """`formats.operand_layout` of a row in this layout."""
    if layout == "lanes" and format == "nvfp4":
        return width, torch.bfloat16, 0, torch.float32
    return formats.operand_layout(format, width, dtype)


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


def layouts_of(format: str, width: int) -> tuple[str, ...]:
    """The layouts that activations of this format and width can have."""
    lanes = ("lanes",) if width % PANEL == 0 and format in ("nvfp4", "fp8", "none") else ()
    return ("rows", *(("swizzled",) if format not in ("fp8", "none") else ()), *lanes)


def scale_shape(lead: Sequence[int], groups: int, scale_layout: str) -> tuple[int, ...]:
    """Shape of the scales of rows [*lead] with this many groups each; ValueError for an unknown layout."""
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(f"scale layout {scale_layout!r} is not one of {', '.join(SCALE_LAYOUTS)}")
    return swizzled_shape(math.prod(lead), groups) if scale_layout == "swizzled" else (*lead, groups)


def lay_out(scales: Tensor, scale_layout: str) -> Tensor:
    """Scales in rows [.., S] -> the same in this layout."""
    return swizzle_scales(scales.reshape(-1, scales.shape[-1])) if scale_layout == "swizzled" else scales


def in_rows(scales: Tensor, lead: Sequence[int], groups: int, scale_layout: str) -> Tensor:
    """The inverse of `lay_out`: scales in this layout -> rows [*lead, S]."""
    if scale_layout != "swizzled":
        return scales
    return unswizzle_scales(scales, math.prod(lead), groups).view(*lead, groups)


def rows_only(scale_layout: str) -> None:
    """ValueError unless scales are in rows: for kernels that know no other layout."""
    if scale_layout != "rows":
        raise ValueError(f"this kernel takes scales in rows, not {scale_layout}")
