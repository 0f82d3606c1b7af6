"""Which kernel multiplies experts' rows of which sizes: tables made from `benchmarks/kernel_speed.py tune-grouped`.

The host knows the number of rows and of experts, not how the rows are split: tiles go by the average."""

import functools
from math import inf
from typing import NamedTuple

from ..linear.choose import Gemv, Scaled, has_gluon, scaled_tile, triton_version


class Gemm(NamedTuple):
    """Tile of the product: weight rows, activation rows, channels; warps, depth of the load pipeline."""

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int


class Hopper(NamedTuple):
    """Tile of Hopper's product: weight rows, activation rows; steps that are copied ahead; programs that share a
    multiprocessor."""

    block_n: int
    block_m: int
    stages: int
    programs: int


# Programs that share a multiprocessor -> (registers of a thread when launched, of the second multiplying warpgroup).
# Three groups of 128 threads are launched: 65,536 registers / (programs * 384), a multiple of 8.
REGISTERS = {1: (168, 240), 2: (80, 112), 3: (56, 72)}

# The tables rest on a tuning run of MXFP4 on an H200, benchmarks/results/tune_experts_h200.json: averages of up to 16
# rows of an expert, and of 256 and more. Between them, and for NVFP4, tiles are those of `linear`, not measured here.

# With at most so many rows, and so many experts for each, a row reads its expert's weights by itself: few rows share an
# expert then, and those of one token never do.
GEMV_ROWS, GEMV_EXPERTS = 16, 4
# Average rows of an expert up to which a tile is taken. Steps have 128 channels if the tile's do not divide the width.
GEMM = {
    "mxfp4": {8: Gemm(64, 16, 256, 4, 4), 24: Gemm(64, 32, 256, 4, 4), inf: Gemm(64, 64, 256, 4, 3)},
    "nvfp4": {8: Gemm(64, 16, 128, 4, 4), 24: Gemm(64, 32, 128, 4, 4), inf: Gemm(64, 64, 128, 4, 4)},
}
HOPPER = {
    "mxfp4": {
        2: Hopper(128, 16, 6, 3),
        8: Hopper(128, 16, 10, 2),
        24: Hopper(128, 32, 8, 2),
        96: Hopper(128, 64, 6, 2),
        384: Hopper(128, 128, 6, 1),
        inf: Hopper(128, 256, 4, 1),
    },
    "nvfp4": {48: Hopper(128, 64, 4, 2), 384: Hopper(128, 128, 4, 1), inf: Hopper(128, 256, 3, 1)},
}
# Average rows of an expert above which Hopper's product is faster: for widths that are multiples of 256, for others.
HOPPER_ROWS = {"mxfp4": (8, 0), "nvfp4": (24, 24)}
SHORT_K = 1024  # up to this width, steps of 128 channels are faster


def table_tile(tiles: dict, average: float):
    """The tile for experts with so many rows on average."""
    return next(tile for most, tile in tiles.items() if average <= most)


def gemm_tile(operand: str, average: float, k: int, precise: bool = False) -> Gemm:
    """The tile of `gemm` for weights decoded to mxfp4's fp8 or nvfp4's bf16, of width k. precise: sums over 128
    channels need steps of 256."""
    tile = table_tile(GEMM[operand], average)
    wide = -(-k // 128) * 128 % tile.block_k == 0 and (k > SHORT_K or precise)
    return tile if wide else tile._replace(block_k=128)


@functools.lru_cache(1024)
def choose(
    format: str,
    activation: str,
    rows: int,
    experts: int,
    n: int,
    k: int,
    capability: tuple[int, int] = (9, 0),
    precise: bool = False,
    portable: bool = False,
) -> Gemv | Gemm | Hopper | Scaled:
    """The kernel for `rows` rows of `experts` weights [n, k]; format: what the weight is decoded to for a tensor core
    (`grouped_format`). precise: MXFP4's channels are summed in fp32 at least every 128. portable: no kernel that a
    package cannot hold."""
    if activation == "same":
        if rows <= min(GEMV_ROWS, experts // GEMV_EXPERTS):
            return Gemv(8, 2048, 4) if k % 2048 == 0 else Gemv(16, 1024, 4)
        if capability >= (10, 0) and not (capability == (12, 1) and triton_version() < (3, 9)):
            return scaled_tile(rows <= 64 * experts, k, capability)
    average, operand = rows / experts, "mxfp4" if format == "mxfp4" else "nvfp4"
    precise = precise and format == "mxfp4"
    least = HOPPER_ROWS[operand][k % 256 > 0]
    if capability == (9, 0) and average > least and not precise and not portable and has_gluon():
        return table_tile(HOPPER[operand], average)
    return gemm_tile(operand, average, k, precise)


def grouped_format(format: str, activation: str, capability: tuple[int, int]) -> str:
    """What a weight is decoded to, as FORMAT of `gemm.grouped_gemm_kernel`: on Hopper MXFP4 meets 4 and 8 bits in fp8;
    else bf16."""
    fp8 = capability == (9, 0) and activation != "none"
    return "mxfp4_bf16" if format == "mxfp4" and not fp8 else format
