"""Which kernel multiplies which shape: tiles, and a table of them made from measurements (docs/kernels.md)."""

import functools
import logging
import os
from typing import NamedTuple

import triton

logger = logging.getLogger("wush_compile")


class Fused(NamedTuple):
    """Tile of the fused product: weight rows, activation rows, channels, parts of K; whether it decodes x itself."""

    bn: int
    bm: int
    bk: int
    split: int
    warps: int
    stages: int
    packed: bool


class Hopper(NamedTuple):
    """Tile of Hopper's product for many rows: weight rows, activation rows, warpgroups that share the former (2 or 4), parts
    of K in the tiles that are left when every multiprocessor has had as many whole ones as the others, steps that are copied
    ahead."""

    bn: int
    bm: int
    warpgroups: int
    split: int
    stages: int


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
    ("mxfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)),
    ("nvfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)),
    ("mxfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 2048, 8)),
    ("nvfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
    ("mxfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
    ("nvfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
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
        16: (Fused(64, 16, 256, 4, 4, 3, False), Fused(64, 16, 256, 1, 4, 3, False)),
        32: (Fused(64, 32, 128, 4, 4, 4, False), Fused(128, 32, 128, 1, 8, 4, False)),
        64: (Fused(64, 64, 128, 4, 4, 4, False), Fused(64, 64, 128, 1, 4, 4, False)),
        128: (Fused(64, 128, 128, 4, 4, 3, False), Fused(64, 128, 128, 1, 4, 3, False)),
        256: (Fused(128, 128, 128, 2, 8, 3, False), Fused(128, 128, 128, 1, 8, 3, False)),
    },
}


# Hopper's product for many rows: tiles, and microseconds that a step of 128 channels takes with one of them on every
# multiprocessor of an H100. These and the figures below are fitted (benchmarks/fit_tiles.py) to what was measured there
# (benchmarks/results/tune_linear_h100.json); they choose what it found fastest, or what is within 5 % of it.
HOPPER = {
    "mxfp4": {
        Hopper(128, 64, 2, 1, 8): 0.284,
        Hopper(128, 128, 2, 1, 6): 0.360,
        Hopper(128, 192, 2, 1, 6): 0.483,
        Hopper(128, 256, 2, 1, 4): 0.600,
        Hopper(256, 32, 4, 1, 8): 0.457,
        Hopper(256, 64, 4, 1, 8): 0.742,
        Hopper(256, 128, 4, 1, 6): 0.789,
    },
    "nvfp4": {
        Hopper(128, 64, 2, 1, 7): 0.557,
        Hopper(128, 128, 2, 1, 5): 0.745,
        Hopper(128, 192, 2, 1, 3): 1.011,
        Hopper(128, 256, 2, 1, 3): 1.207,
        Hopper(256, 32, 4, 1, 7): 0.95,
        Hopper(256, 64, 4, 1, 6): 1.105,
        Hopper(256, 128, 4, 1, 4): 1.480,
    },
}
# It is faster above so many rows, for at most FEW weight rows and for more.
LEAST_ROWS = {"mxfp4": (64, 16), "nvfp4": (64, 16)}
# Microseconds: of a tile or part besides its steps; of handing sums from part to part, and of each value of a tile that does.
LAUNCH, HAND, VALUE = 3.4, 0.9, 1.3e-4
MULTIPROCESSORS = 132  # of an H100 or H200 with HBM3; an H100 for PCIe has 114


def parts(tiles: int, split: int, multiprocessors: int) -> tuple[int, int]:
    """(tiles of the tail, parts of each), at most `split`. A program hands sums on to the next one, which waits: if a GPU has no
    place for all of them, it has one for the lower numbers. So a tile's parts must lie in one round of the programs, one after
    the other, which they do if that is the only round or their number divides the programs'."""
    tail = tiles % multiprocessors
    while tiles + tail * (split - 1) > multiprocessors and multiprocessors % split:
        split -= 1
    return (tail, split) if split > 1 else (0, 1)


def hopper_times(format: str, rows: int, n: int, k: int, multiprocessors: int = MULTIPROCESSORS) -> dict[Hopper, float]:
    """Microseconds that the product for many rows takes with each tile, and each number of parts worth thinking of."""
    steps, times = k // 128, {}
    for tile, step in HOPPER[format].items():
        tiles = -(-n // tile.bn) * -(-rows // tile.bm)
        waves, tail = divmod(tiles, multiprocessors)
        whole = LAUNCH + step * steps
        times[tile] = (waves + (tail > 0)) * whole
        # Four warpgroups have no registers left for what a part needs.
        for split in range(2, min(8, steps) + 1 if tail and tile.warpgroups == 2 else 0):
            if parts(tiles, split, multiprocessors)[1] < split:
                continue
            part = LAUNCH + step * -(-steps // split)
            handing = (split - 1) * (HAND + VALUE * tile.bn * tile.bm)
            times[tile._replace(split=split)] = waves * whole + -(-tail * split // multiprocessors) * part + handing
    return times


def _hopper(format: str, rows: int, n: int, k: int, library: bool, multiprocessors: int) -> "Hopper | str":
    """The tile for many rows that takes least time; or, if `library`, "library" or "bf16", where expanding the weight first
    takes less."""
    times = hopper_times(format, rows, n, k, multiprocessors)
    if library and rows >= 512:
        name, value, product = ("library", 0.65e-6, 1.15e-9) if format == "mxfp4" else ("bf16", 1.14e-6, 2.42e-9)
        times[name] = 2 + value * n * k + product * rows * n * k
    return min(times, key=times.get)


_failures: list[Exception] = []


def has_gluon() -> bool:
    """Whether this Triton has what Hopper's product for many rows is written in: an interface that still changes."""
    if not _failures:
        try:
            from . import hopper as triton_hopper  # noqa: F401
        except (ImportError, AttributeError) as error:
            give_up_gluon(error)
    return not _failures


def give_up_gluon(error: Exception) -> None:
    """Hopper's product for many rows failed: from now on the others do its work, as one warning says."""
    _failures.append(error)
    choose.cache_clear()
    logger.warning(
        "triton %s cannot run the product for many rows (%s: %s): a slower one is used",
        triton.__version__,
        type(error).__name__,
        str(error).split("\n")[0],
    )


@functools.lru_cache(1024)
def choose(
    format: str,
    rows: int,
    n: int,
    k: int,
    capability: tuple[int, int] = (9, 0),
    precise: bool = False,
    portable: bool = False,
    library: bool = True,
    multiprocessors: int = MULTIPROCESSORS,
) -> "Gemv | Fused | Hopper | Scaled | Int4 | str":
    """The kernel for [rows, k] times [n, k] on a device of that compute capability: a tile, "library" or "bf16".

    Measured on H100s and H200s over the linear groups of Llama-3.1-8B (docs/kernels.md). Ampere and Ada take what needs no
    layout of theirs to have been tested. precise: channels are added up in fp32 at least every 128. portable: no kernel that
    a package cannot hold. library: False if "library" cannot compute the call.
    """
    if format == "int4":
        return Int4(64, 16, 4, 4) if rows <= 16 else Int4(64, 64, 4, 4) if rows <= 64 else Int4(128, 128, 8, 3)
    if rows in (1, 2) or rows == 4 and (capability[0] != 9 or k % 128 or n <= FEW and k <= SHORT):
        return GEMV[format, rows][k > SHORT]
    if capability >= (10, 0):
        if capability == (12, 1) and triton_version() < (3, 9):  # Triton 3.6 emulates there
            return "bf16"
        return Scaled(128, 64 if rows <= 128 else 128, 256 if k % 256 == 0 else 128, 4, 3)
    if k % 128 or (capability < (9, 0) and (format == "mxfp4" or rows > 128)):
        return "bf16"
    precise = precise and format == "mxfp4"
    if capability == (9, 0) and rows > LEAST_ROWS[format][n > FEW] and not precise and not portable and has_gluon():
        return _hopper(format, rows, n, k, library, multiprocessors)
    if precise and rows > 64:
        # A second accumulator fits beside this tile's; above, cuBLASLt's own is faster.
        tile = FUSED["mxfp4"][128][n > FEW] if rows <= 512 else None
    else:
        tile = next((tiles[n > FEW] for most, tiles in FUSED[format].items() if rows <= most), None)
    if tile is None:
        return "bf16" if format == "nvfp4" else "library" if library else WIDE
    bk = tile.bk if k % tile.bk == 0 else 128
    # A part of fewer than 32 channels for each row of the tile costs more to add to the others than it saves.
    most = max(1, min(tile.split, k // (32 * tile.bm)))
    return tile._replace(bk=bk, split=_power_of_two_divisor(k // bk, 1 << most.bit_length() - 1))


def precise_by_default() -> bool:
    """Whether `WUSH_PRECISE` asks for sums in fp32 (1, or anything but 0)."""
    return os.environ.get("WUSH_PRECISE", "0") not in ("", "0")


@functools.cache
def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
