"""What all renderers share: the register, results, rounding, tables; and the numbers in sentences."""

import json
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results"
FIGURES: dict[str, Callable[..., str]] = {}


def figure(function: Callable[..., str]) -> Callable[..., str]:
    FIGURES[function.__name__] = function
    return function


@cache
def result(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def shown(value: float, digits: int = 0) -> str:
    """`value` with that many decimals. Halves are rounded up, as they are on paper."""
    return str(Decimal(repr(float(value))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def percent(share: float, digits: int = 0) -> str:
    return f"{shown(100 * share, digits)} %"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "|" + "|".join(cell if cell == "---" else f" {cell} ".replace("  ", " ") for cell in line) + "|"
        for line in lines
    )


def at(name: str, path: str) -> float:
    """The number at `path`, keys separated by slashes, of a result."""
    value = result(name)
    for key in path.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return value


@figure
def number(name: str, path: str, digits: str = "0", scale: str = "1") -> str:
    return shown(at(name, path) * float(scale), int(digits))


@figure
def ratio(name: str, path: str, over: str, digits: str = "2") -> str:
    return shown(at(name, path) / at(name, over), int(digits))


@figure
def change(name: str, path: str, over: str) -> str:
    """By which share the number at `path` differs from the one at `over`, without its sign."""
    return percent(abs(at(name, path) / at(name, over) - 1))
