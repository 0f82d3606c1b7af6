"""Which kernel multiplies which shape: tiles, and tables of tiles made from measurements.

docs/notebook/linear_kernel.md has the measurements.
"""

import functools
import logging
import os
from typing import NamedTuple

import triton

from . import older

logger = logging.getLogger("wush_compile")


class Fused(NamedTuple):
    """Tile of the fused product: weight rows, activation rows, channels; parts of K; warps, depth of the load pipeline;
    whether the kernel decodes x itself."""

    block_n: int
    block_m: int
    block_k: int
    split_k: int
    warps: int
    stages: int
    packed: bool


class Hopper(NamedTuple):
    """Tile of Hopper's product for many rows: weight rows; activation rows; warpgroups that share the weight rows (2 or
    4); parts of K for the tiles of the last, incomplete wave; steps that are copied ahead."""

    block_n: int
    block_m: int
    warpgroups: int
    split_k: int
    stages: int


class Gemv(NamedTuple):
    """Weight rows of a program, channels of a step, warps."""

    block_n: int
    block_k: int
    warps: int


class Scaled(NamedTuple):
    """Tile of Blackwell's product: activation rows, weight rows, channels; warps, depth of the load pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


class Int4(NamedTuple):
    """Tile of the int4 product: weight rows, activation rows; warps, depth of the load pipeline."""

    block_n: int
    block_m: int
    warps: int
    stages: int


class Int8Gemv(NamedTuple):
    """Tile of one row times weights of 8 bits: weight rows, channels of a step; warps."""

    block_n: int
    block_k: int
    warps: int


class Int8(NamedTuple):
    """Tile of more rows times weights of 8 bits: weight rows, activation rows, channels; warps, load pipeline."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


# Tiles are numbered in bands of so many tiles of M: the programs that run at the same time then share weight tiles and
# tiles of x in L2. 8 is the usual value of Triton's matmul examples; no kept run compares others.
GROUP_M = 8
# The fused kernel for many rows, where the library cannot be used.
FUSED_MANY_ROWS = Fused(128, 128, 128, 1, 8, 4, False)

# The tables below rest on tuning runs on H100s (`benchmarks/kernel_speed.py tune-linear`). The kept run,
# benchmarks/results/tune_linear_h100.json, has 64 rows and more. GEMV, FUSED[16], FUSED[32], FUSED[256], and every
# figure whose comment says so, rest on runs that were not kept. `benchmarks/fit_tiles.py` fits or checks the rest.
# Above 64 rows it finds every choice within 5 % of the fastest candidate. At 64 rows NVFP4's FUSED[64] is up to 26 %
# slower.

# Weight rows above which a weight fills the GPU without split-K, and channels above which `gemv` walks a row in several
# steps.
NARROW_N, SHORT_K = 8192, 4096
# (format, rows) -> (tile for K <= SHORT_K, tile for longer rows).
GEMV = {
    ("mxfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)),
    ("nvfp4", 1): (Gemv(8, 4096, 4), Gemv(16, 2048, 8)),
    ("mxfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 2048, 8)),
    ("nvfp4", 2): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
    ("mxfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
    ("nvfp4", 4): (Gemv(16, 1024, 4), Gemv(16, 1024, 4)),
}
# Most rows -> (tile for N <= NARROW_N, tile for more weight rows).
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

# Hopper's product for many rows: tiles, and the microseconds that a step of 128 channels takes with the tile on every
# multiprocessor of an H100.
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
        Hopper(256, 32, 4, 1, 7): 0.95,  # from a run that was not kept
        Hopper(256, 64, 4, 1, 6): 1.105,
        Hopper(256, 128, 4, 1, 4): 1.480,
    },
}
# Microseconds of a tile, or of a part of one, besides its steps.
TILE_US = 3.4
# Microseconds of handing sums from one part to the next: a constant, and for each value of the tile.
HANDOVER_US, HANDOVER_US_PER_VALUE = 0.9, 1.3e-4
# Hopper's product is faster above so many rows: for N <= NARROW_N, for more weight rows. The second figure rests on a
# run that was not kept.
LEAST_ROWS = {"mxfp4": (64, 16), "nvfp4": (64, 16)}
MULTIPROCESSORS = 132  # of an H100 or H200 with HBM3; an H100 for PCIe has 114


class Library(NamedTuple):
    """Microseconds of the library's product: a constant, for each weight value that is upcast, for each product."""

    name: str
    launch: float
    weight: float
    product: float


# The kept run gives 0.66e-6 and 1.08e-9 for MXFP4, 1.23e-6 and 2.09e-9 for NVFP4, and a constant of 0.3. NVFP4's
# figures and the constants rest on a run that was not kept.
LIBRARY = {"mxfp4": Library("library", 2.0, 0.65e-6, 1.15e-9), "nvfp4": Library("bf16", 2.0, 1.14e-6, 2.42e-9)}
LIBRARY_ROWS = 512  # with fewer rows, Hopper's product is always taken


def scaled_tile(few: bool, k: int, capability: tuple[int, int]) -> Scaled:
    """Blackwell's tile for few or many rows. On sm_120, whose sums stay in registers, 4 warps spill the larger."""
    warps = 8 if capability >= (12, 0) and not few else 4
    return Scaled(128, 64 if few else 128, 256 if k % 256 == 0 else 128, warps, 3)


def _power_of_two_divisor(n: int, limit: int) -> int:
    return min(n & -n, limit)


def split_tail(tiles: int, split_k: int, multiprocessors: int) -> tuple[int, int]:
    """(tiles of the last, incomplete wave, parts of each): at most `split_k` parts; (0, 1) if no split is possible.

    A program hands its sums to the next one, which waits for them. If the GPU cannot hold all programs at once, it
    holds those with lower numbers. So all parts of a tile must lie in one round of the programs. They do if there is
    only one round, or if the number of parts divides the number of programs."""
    tail = tiles % multiprocessors
    while tiles + tail * (split_k - 1) > multiprocessors and multiprocessors % split_k:
        split_k -= 1
    return (tail, split_k) if split_k > 1 else (0, 1)


def hopper_times(format: str, rows: int, n: int, k: int, multiprocessors: int = MULTIPROCESSORS) -> dict[Hopper, float]:
    """Microseconds of the product for many rows with each tile and each number of parts that can be worth it."""
    steps, times = k // 128, {}
    for tile, step_us in HOPPER[format].items():
        tiles = -(-n // tile.block_n) * -(-rows // tile.block_m)
        waves, tail = divmod(tiles, multiprocessors)
        whole = TILE_US + step_us * steps
        times[tile] = (waves + (tail > 0)) * whole
        # Four warpgroups have no registers left for what a part needs.
        for split_k in range(2, min(8, steps) + 1 if tail and tile.warpgroups == 2 else 0):
            if split_tail(tiles, split_k, multiprocessors)[1] < split_k:
                continue
            part = TILE_US + step_us * -(-steps // split_k)
            handover = (split_k - 1) * (HANDOVER_US + HANDOVER_US_PER_VALUE * tile.block_n * tile.block_m)
            rounds = -(-tail * split_k // multiprocessors)
            times[tile._replace(split_k=split_k)] = waves * whole + rounds * part + handover
    return times


def library_time(format: str, rows: int, n: int, k: int) -> float:
    """Microseconds of the library's product, the upcast of the weight included."""
    _, launch, weight, product = LIBRARY[format]
    return launch + weight * n * k + product * rows * n * k


def _hopper(format: str, rows: int, n: int, k: int, library: bool, multiprocessors: int) -> "Hopper | str":
    """The fastest tile for many rows; with `library`, the library's name where the library is faster."""
    times = hopper_times(format, rows, n, k, multiprocessors)
    if library and rows >= LIBRARY_ROWS:
        times[LIBRARY[format].name] = library_time(format, rows, n, k)
    return min(times, key=times.get)


_failures: list[Exception] = []


def has_gluon() -> bool:
    """Whether this Triton has the Gluon that Hopper's product for many rows needs. Gluon's interface still changes."""
    if not _failures:
        try:
            from . import hopper  # noqa: F401
        except (ImportError, AttributeError) as error:
            give_up_gluon(error)
    return not _failures


def give_up_gluon(error: Exception) -> None:
    """Takes other kernels from now on, after Hopper's product for many rows failed. One warning says so."""
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

    Measured on H100s and H200s over the linear groups of Llama-3.1-8B (docs/notebook/linear_kernel.md); for Ampere and
    Ada counted (`older.py`).

    precise: channels are summed in fp32 at least every 128. portable: no kernel that a package cannot hold. library:
    False if "library" cannot compute the call.
    """
    if format == "int4":
        return Int4(64, 16, 4, 4) if rows <= 16 else Int4(64, 64, 4, 4) if rows <= 64 else Int4(128, 128, 8, 3)
    # On an H200 4 rows of NVFP4 times [6144, 4096] take 19 µs by `gemv` and 13 by `fused`; MXFP4 12 and 13.
    short = format == "mxfp4" and n <= NARROW_N and k <= SHORT_K
    if rows in (1, 2) or rows == 4 and (capability[0] != 9 or k % 128 or short):
        return GEMV[format, rows][k > SHORT_K]
    if capability >= (10, 0):
        if capability == (12, 1) and triton_version() < (3, 9):  # Triton 3.6 emulates FP4 there
            return "bf16"
        return scaled_tile(rows <= 128, k, capability)
    counted = older.fused(rows, n, k, capability, multiprocessors) if capability < (9, 0) and k % 128 == 0 else None
    if k % 128 or capability < (9, 0) and counted is None:
        return "bf16"
    if counted is not None:
        tile, parts = counted
        return Fused(tile.block_n, tile.block_m, tile.block_k, parts, tile.warps, tile.stages, False)
    precise = precise and format == "mxfp4"
    if (
        capability == (9, 0)
        and rows > LEAST_ROWS[format][n > NARROW_N]
        and not precise
        and not portable
        and has_gluon()
    ):
        return _hopper(format, rows, n, k, library, multiprocessors)
    if precise and rows > 64:
        # A second accumulator fits beside this tile's. Above 512 rows cuBLASLt's own accumulator is faster.
        tile = FUSED["mxfp4"][128][n > NARROW_N] if rows <= 512 else None
    else:
        tile = next((tiles[n > NARROW_N] for most, tiles in FUSED[format].items() if rows <= most), None)
    if tile is None:
        return "bf16" if format == "nvfp4" else "library" if library else FUSED_MANY_ROWS
    block_k = tile.block_k if k % tile.block_k == 0 else 128
    # A part of fewer than 32 channels for each row of the tile costs more to add to the others than it saves.
    most = max(1, min(tile.split_k, k // (32 * tile.block_m)))
    return tile._replace(block_k=block_k, split_k=_power_of_two_divisor(k // block_k, 1 << most.bit_length() - 1))


def decoded_format(format: str, activation: str, capability: tuple[int, int]) -> str:
    """What the products that decode only the weight call it, as FORMAT of `gemm.fused_gemm_kernel`: MXFP4 times 4 or 8
    bits in fp8 on Hopper; else both operands are bf16."""
    if format == "mxfp4" and not (activation != "none" and capability == (9, 0)):
        return "mxfp4_bf16"
    return format


def choose_decoding(
    decoded: str,
    rows: int,
    n: int,
    k: int,
    capability: tuple[int, int] = (9, 0),
    precise: bool = False,
    library: bool = True,
    multiprocessors: int = MULTIPROCESSORS,
    portable: bool = False,
) -> "Fused | Hopper | str":
    """`choose` for activations of 8 or 16 bits: only kernels that decode the weight alone, with the tiles measured for
    4 bits, or "library" or "bf16". decoded: as `decoded_format`; int4 too.

    On Blackwell none of them has been tried, and cuBLAS multiplies decoded operands."""
    if capability >= (10, 0) or k % 128 or decoded == "int4":
        return "bf16"
    format = "mxfp4" if decoded == "mxfp4" else "nvfp4"  # tiles go by the operands of the tensor core
    kernel = choose(format, max(rows, 5), n, k, capability, precise, portable, library, multiprocessors)  # no `gemv`
    return kernel._replace(packed=False) if isinstance(kernel, Fused) else kernel


# NVFP4 activations of so many rows stay packed between quantizer and product. Of more rows the quantizer writes the
# values in a compiled graph (layout `lanes`).
PACKED_ROWS = 16
# Tiles of Hopper's product for weights of 8 bits, which no run has measured: none is chosen (`head_speed.py --tune`).
HOPPER_INT8 = (
    Hopper(128, 64, 2, 1, 6),
    Hopper(128, 128, 2, 1, 4),
    Hopper(128, 192, 2, 1, 3),
    Hopper(128, 256, 2, 1, 2),
    Hopper(256, 32, 4, 1, 5),
)
# Up to so many rows a weight of 8 bits is decoded in registers; the library multiplies more.
INT8_ROWS = 64


def choose_int8(rows: int, n: int, k: int) -> "Int8Gemv | Int8 | str":
    """The kernel for [rows, k] times a weight of 8 bits [n, k]: a tile, or "bf16".

    Not tuned: a half group a thread, no barrier in `gemv`'s loop, and enough programs to fill a GPU
    (benchmarks/head_speed.py)."""
    if rows == 1:
        return Int8Gemv(32, 256, 4) if n > NARROW_N else Int8Gemv(8, 1024, 4)
    if rows > INT8_ROWS:
        return "bf16"
    return Int8(64, 16 if rows <= 16 else 32 if rows <= 32 else 64, 128, 4, 4)


def precise_by_default() -> bool:
    """Whether `WUSH_PRECISE` asks for sums in fp32: 1, or anything but 0."""
    return os.environ.get("WUSH_PRECISE", "0") not in ("", "0")


@functools.cache
def triton_version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
