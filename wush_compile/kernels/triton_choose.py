"""Which kernel multiplies which shape: tiles, and a table of them made from measurements (docs/kernels.md)."""

import functools
import os
from typing import NamedTuple

import triton


class Fused(NamedTuple):
    """Tile of the fused product: weight rows, activation rows, channels, parts of K; whether it decodes x itself."""

    bn: int
    bm: int
    bk: int
    split: int
    warps: int
    stages: int
    packed: bool


class Gemv(NamedTuple):
    """Weight rows of a program, channels of a step, warps."""

    bn: int
    bk: int
    warps: int


class Scaled(NamedTuple):
    """Tile of Blackwell's product: activation rows, weight rows, channels; warps, depth of the load pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


class Int4(NamedTuple):
    """Tile of the int4 product: weight rows, activation rows; warps, depth of the load pipeline."""

    bn: int
    bm: int
    warps: int
    stages: int


# The fused kernel for many rows, where the library cannot be used.
WIDE = Fused(128, 128, 128, 1, 8, 4, False)


def _power_of_two_divisor(n: int, limit: int) -> int:
    return min(n & -n, limit)


# Widths above which a weight fills the GPU without splitting K, and above which `gemv` walks a row in several steps.
FEW, SHORT = 8192, 4096
# (format, rows) -> (for short rows, for long ones).
GEMV = {
    ("mxfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)), ("nvfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)),
    ("mxfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 2048, 8)), ("nvfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
    ("mxfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)), ("nvfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
}
# Rows up to -> (for at most FEW weight rows, for more).
FUSED = {
    "mxfp4": {
        16: (Fused(64, 16, 256, 4, 4, 4, True), Fused(128, 16, 256, 1, 8, 3, False)),
        32: (Fused(64, 32, 256, 4, 4, 4, False), Fused(128, 32, 256, 1, 8, 3, False)),
        64: (Fused(64, 64, 256, 4, 4, 3, False), Fused(128, 64, 256, 1, 8, 3, False)),
        128: (Fused(64, 128, 256, 4, 4, 3, False), Fused(64, 128, 256, 1, 4, 3, False)),
        256: (Fused(128, 128, 128, 2, 8, 4, False), Fused(128, 256, 128, 1, 8, 3, False)),
    },
    "nvfp4": {
        16: (Fused(64, 16, 256, 4, 4, 3, False), Fused(128, 16, 128, 1, 8, 4, False)),
        32: (Fused(64, 32, 128, 4, 4, 4, False), Fused(128, 32, 128, 1, 8, 4, False)),
        64: (Fused(64, 64, 128, 4, 4, 4, False), Fused(64, 64, 128, 1, 4, 4, False)),
        128: (Fused(64, 128, 128, 4, 4, 3, False), Fused(64, 128, 128, 1, 4, 3, False)),
        256: (Fused(128, 128, 128, 2, 8, 3, False), Fused(128, 128, 128, 1, 8, 3, False)),
    },
}


@functools.lru_cache(1024)
def choose(
    format: str, rows: int, n: int, k: int, capability: tuple[int, int] = (9, 0), precise: bool = False
) -> "Gemv | Fused | Scaled | Int4 | str":
    """The kernel for [rows, k] times [n, k] on a device of that compute capability: a tile, "library" or "bf16".

    Measured on an H200 over the linear groups of Llama-3.1-8B (docs/kernels.md). Ampere and Ada take what needs no layout
    of theirs to have been tested. precise: channels are added up in fp32 at least every 128.
    """
    if format == "int4":
        return Int4(64, 16, 4, 4) if rows <= 16 else Int4(64, 64, 4, 4) if rows <= 64 else Int4(128, 128, 8, 3)
    if rows in (1, 2) or rows == 4 and (capability[0] != 9 or k % 128 or n <= FEW and k <= SHORT):
        return GEMV[format, rows][k > SHORT]
    if capability >= (10, 0):
        if capability == (12, 1) and triton_version() < (3, 9):         # Triton 3.6 emulates there
            return "bf16"
        return Scaled(128, 64 if rows <= 128 else 128, 256 if k % 256 == 0 else 128, 4, 3)
    if k % 128 or (capability < (9, 0) and (format == "mxfp4" or rows > 128)):
        return "bf16"
    if precise and format == "mxfp4" and rows > 64:
        # A second accumulator fits beside this tile's; above, cuBLASLt's own is faster.
        tile = FUSED["mxfp4"][128][n > FEW] if rows <= 512 else None
    else:
        tile = next((tiles[n > FEW] for most, tiles in FUSED[format].items() if rows <= most), None)
    if tile is None:
        return "bf16" if format == "nvfp4" else "library"
    bk = tile.bk if k % tile.bk == 0 else 128
    # A part of fewer than 16 channels for each row of the tile costs more to add to the others than it saves.
    most = max(1, min(tile.split, k // (16 * tile.bm)))
    return tile._replace(bk=bk, split=_power_of_two_divisor(k // bk, 1 << most.bit_length() - 1))


def precise_by_default() -> bool:
    """Whether `WUSH_PRECISE` asks for sums in fp32 (1, or anything but 0)."""
    return os.environ.get("WUSH_PRECISE", "0") not in ("", "0")


@functools.cache
def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
