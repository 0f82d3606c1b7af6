"""What a group of linears costs at each rung: microseconds of its products on a GPU, or bytes of its weights.

Times come from a table that was measured with the kernels themselves, where there is one for the GPU. Elsewhere they
are a model: bytes over bandwidth, or operations over the peak rate, whichever takes longer.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from ..errors import ConfigError, one_of
from ..formats import get_format

KEPT = "W16A16"


def rungs(format: str) -> dict[str, dict]:
    """The rungs beside 16 bits on both sides: name -> settings of a recipe."""
    return {
        "W4A4": {"format": format, "activation_format": "same"},
        "W4A8": {"format": format, "activation_format": "fp8"},
        "W4A16": {"format": format, "activation_format": None},
        "W8A16": {"format": "int8", "activation_format": None},
    }


@dataclass(frozen=True)
class Gpu:
    """Memory bandwidth, bytes/s, and dense tensor-core rates, operations/s; from the vendor's data sheets."""

    name: str
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float | None = None

    def rate(self, rung: str, format: str) -> float:
        """The rate of a rung's product. Without fp4 MXFP4 multiplies in fp8, NVFP4 in bf16 (docs/spec.md §8)."""
        if rung == "W4A4" and self.fp4 is not None:
            return self.fp4
        return self.fp8 if rung == "W4A8" or (rung == "W4A4" and format == "mxfp4") else self.bf16

    def __str__(self) -> str:
        return f"{self.name}'s bandwidth and peak rates, not measured"

    def microseconds(self, rung: str, format: str, rows: int, n: int, k: int) -> float:
        """rows [rows, k] times a weight [n, k]."""
        moved = held(rung, format, n, k) + 2 * rows * (k + n)
        return 1e6 * max(moved / self.bandwidth, 2 * rows * n * k / self.rate(rung, format))


@dataclass(frozen=True)
class Table:
    """Times that were measured (`benchmarks/rung_costs.py`).

    us   name of a rung -> rows -> (constant, for each million weights, for each thousand channels): microseconds
    """

    name: str
    date: str
    us: dict[str, dict[int, tuple[float, float, float]]]

    def __str__(self) -> str:
        return f"the kernels' times, measured on {self.name} ({self.date})"

    def microseconds(self, rung: str, format: str, rows: int, n: int, k: int) -> float:
        """rows [rows, k] times a weight [n, k], with the quantizer: linear between the numbers of rows in the table."""
        name = rung if rung in (KEPT, "W8A16") else f"{format} {rung}"
        if name not in self.us:
            raise ConfigError(f"the table of {self.name} has no {name}: take another format, or measure that too")
        known = {m: c + a * n * k / 1e6 + b * k / 1e3 for m, (c, a, b) in sorted(self.us[name].items())}
        below = max((m for m in known if m <= rows), default=min(known))
        above = min((m for m in known if m >= rows), default=None)
        if above is None:
            return known[below] * rows / below
        share = 0.0 if above == below else (max(rows, below) - below) / (above - below)
        return known[below] + share * (known[above] - known[below])


GPUS = {
    "h100": Gpu("H100", 3.35e12, 989e12, 1979e12),
    "h200": Gpu("H200", 4.8e12, 989e12, 1979e12),
    "b200": Gpu("B200", 8e12, 2250e12, 4500e12, 9000e12),
    "rtx5090": Gpu("RTX 5090", 1.79e12, 210e12, 419e12, 1676e12),
    "rtx4090": Gpu("RTX 4090", 1.01e12, 165e12, 330e12),
}


@cache
def machine(name: str) -> "Gpu | Table":
    """A GPU by name, or by the file of a table: its measured times if there are any, else the model of it.

    Raises `ConfigError` for a name or a file that says nothing.
    """
    shipped = files(__package__) / "gpu_times" / f"{name}.json"
    own = name.endswith(".json")
    if not own:
        one_of("gpu", name, GPUS)
        if not shipped.is_file():
            return GPUS[name]
    try:
        table = json.loads((Path(name) if own else shipped).read_text())
        us = {rung: {int(m): tuple(map(float, c)) for m, c in rows.items()} for rung, rows in table["us"].items()}
        if not us or not all(len(c) == 3 and all(map(math.isfinite, c)) for rows in us.values() for c in rows.values()):
            raise ValueError("a row has three numbers")
        return Table(table["device"], table["date"], us)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} is no table of costs ({error}): benchmarks/rung_costs.py writes one") from error


def held(rung: str, format: str, n: int, k: int) -> float:
    """Bytes of a weight [n, k], with scales and transform."""
    group = get_format(format).group_size
    bits = {KEPT: 16.0, "W8A16": 8 + 16 / 32}.get(rung, 4 + 8 / group)
    return n * k * bits / 8 + (2 * k * group if rung.startswith("W4") else 0)


@dataclass(frozen=True)
class Cost:
    """The cost of a group at a rung: microseconds on a GPU for a number of rows, or bytes of its weights."""

    format: str
    machine: Gpu | Table | None
    rows: int

    def __str__(self) -> str:
        if self.machine is None:
            return "bytes of weights"
        return f"time of {self.rows} row{'s' * (self.rows > 1)} by {self.machine}"

    def __call__(self, group, rung: str) -> float:
        """group: a `Surveyed`, [rows, width]."""
        if self.machine is None:
            return held(rung, self.format, group.rows, group.width)
        return self.machine.microseconds(rung, self.format, self.rows, group.rows, group.width)
