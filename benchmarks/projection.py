"""Floors for the kernels of csrc/: the bytes they must move and the operations they issue, at datasheet rates.

    python benchmarks/projection.py                     B200 and RTX 5090, both formats: Markdown tables

Nothing here is measured. Bytes and operations are counted, and rates are the vendor's. Each time is *projected*: no
kernel gets below it. Shapes are the linear groups of one Llama-3.1-8B decoder layer. What is counted:

- Bytes of a product: codes and scales of both operands once, the bf16 output once. The rest is assumed to stay in the
  L2 cache. Bytes of a quantizer: bf16 in, codes and scales out, the transform once.
- Operations that are issued. This includes rows and columns by which a tile overhangs, and the last wave, whose blocks
  keep only a part of the GPU busy.
"""

import argparse
import math
from typing import NamedTuple

GROUPS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # name: (N, K)
ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
GROUP_SIZE = {"mxfp4": 32, "nvfp4": 16}


class Device(NamedTuple):
    """Datasheet rates: dense FP4 and bf16 operations per second (fp32 accumulation), bytes of memory per second."""

    name: str
    fp4: float
    bf16: float
    memory: float
    multiprocessors: int
    source: str


DEVICES = (
    Device(
        "B200",
        9e15,
        2.25e15,
        8e12,
        148,
        "NVIDIA DGX B200 datasheet, an eighth of it: 72 PFLOP/s dense FP4, 64 TB/s; 1000 W",
    ),
    Device(
        "RTX 5090",
        1676e12,
        209.5e12,
        1.792e12,
        170,
        "NVIDIA RTX Blackwell GPU architecture whitepaper: half of 3352 TFLOP/s with sparsity; 2407 MHz",
    ),
)


class Tile(NamedTuple):
    """Rows and columns of the output that a block (or `together` blocks) computes; `resident` blocks share a
    multiprocessor."""

    name: str
    rows: int
    columns: int
    together: int = 1
    resident: int = 1


SM120 = (Tile("narrow", 16, 32, resident=2), Tile("middle", 64, 32, resident=2), Tile("wide", 128, 128))
SM100 = (Tile("narrow", 128, 64), Tile("wide", 256, 256, together=2))


def choose(device: Device, m: int, n: int) -> Tile:
    """The tile that the launchers choose (csrc/linear_tiles.h)."""
    sms = device.multiprocessors
    if device.name == "B200":
        return SM100[m > 128 and 2 * math.ceil(m / 256) * math.ceil(n / 256) >= sms]
    if m <= 16:
        return SM120[0]
    return SM120[2 if m > 64 and math.ceil(m / 128) * math.ceil(n / 128) >= sms else 1]


class Count(NamedTuple):
    """One product: its bytes and operations, the useful share of the issued operations, the share of the
    multiprocessors' time in which they have blocks, and the two times in seconds."""

    tile: Tile
    moved: int
    operations: int
    useful: float
    busy: float
    memory_time: float
    compute_time: float

    @property
    def floor(self) -> float:
        return max(self.memory_time, self.compute_time)


def count(device: Device, format: str, m: int, n: int, k: int) -> Count:
    """The product of M rows of K channels and an [N, K] weight."""
    tile = choose(device, m, n)
    moved = (m + n) * (k // 2 + k // GROUP_SIZE[format]) + 2 * m * n
    operations = 2 * m * n * k
    tiles = math.ceil(m / tile.rows) * math.ceil(n / tile.columns)
    useful = m * n / (tiles * tile.rows * tile.columns)
    slots = device.multiprocessors * tile.resident // tile.together
    # Blocks on one multiprocessor share its tensor cores: a wave takes as long as the busiest multiprocessor.
    full, rest = divmod(tiles, slots)
    last = math.ceil(rest * tile.together / device.multiprocessors) / tile.resident
    busy = tiles / slots / (full + last)
    compute_time = operations / (useful * busy * device.fp4)
    return Count(tile, moved, operations, useful, busy, moved / device.memory, compute_time)


def quantizer_floor(device: Device, format: str, m: int, k: int) -> float:
    """Seconds for M rows of K channels, a G x G matrix a group: every byte once, or the operations in bf16."""
    group = GROUP_SIZE[format]
    moved = m * (2 * k + k // 2 + k // group) + 2 * group * k
    return max(moved / device.memory, 2 * m * k * group / device.bf16)


def bf16_floor(device: Device, m: int, n: int, k: int) -> float:
    """Seconds of the unquantized product: every byte once, or its operations in bf16."""
    return max(2 * (m * n + m * k + n * k) / device.memory, 2 * m * n * k / device.bf16)


def table(device: Device, format: str) -> str:
    lines = [
        f"{device.name}, {format.upper()}, *projected* floors in µs ({device.source})",
        "",
        "| rows | " + " | ".join(GROUPS) + " | products | quantizers | bf16's floor | bound |",
        "|---|" + "---|" * (len(GROUPS) + 4),
    ]
    for m in ROWS:
        counts = [count(device, format, m, n, k) for n, k in GROUPS.values()]
        cells = [f"{c.floor * 1e6:.1f} {c.tile.name}" for c in counts]
        total, bf16 = sum(c.floor for c in counts), sum(bf16_floor(device, m, n, k) for n, k in GROUPS.values())
        quantizers = sum(quantizer_floor(device, format, m, k) for _, k in GROUPS.values())
        memory = sum(c.memory_time >= c.compute_time for c in counts)
        bound = {len(counts): "memory", 0: "arithmetic"}.get(memory, f"memory in {memory} of {len(counts)}")
        cells = [str(m)] + cells + [f"{t * 1e6:.1f}" for t in (total, quantizers, bf16)] + [bound]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for device in DEVICES:
        for format in GROUP_SIZE:
            print(table(device, format), end="\n\n")


if __name__ == "__main__":
    main()
