"""Random numbers and operands of fuzzed calls (`fuzz.py`)."""

import math
import random

import torch
from torch import Tensor

from .. import feedback
from ..formats import FORMATS

ROWS = 10  # numbers of rows in a family
MOST_VALUES = 2**23  # of an operand
# Share of bytes of codes that rounding with feedback may change where its sums of errors are added up in another order.
# A code flips where such a sum's last bits decide, and takes later codes of its group along: up to the whole group. On
# normal values sums in float64 and two other orders of fp32 change none of 4·10^6 bytes, sums cut to 18 bits 1e-5 of
# them, and errors that are not rounded to bf16 2e-3 (benchmarks/trial_feedback_sums.py).
FEEDBACK_SHARE = 2e-5


def feedback_limit(rows: int, width: int, format: str, share: float = FEEDBACK_SHARE) -> float:
    """The share of bytes of codes [rows, width/2] that may differ: `share`, and of a few the bytes of one group."""
    return max(share, FORMATS[format].group_size / (rows * width))


def signed_permutations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """fp32 [count, size, size], times powers of two: every sum of a transform has one term."""
    order = torch.rand(count, size, generator=generator).argsort(1)
    signs = torch.randint(0, 2, (count, size, 1), generator=generator) * 2.0 - 1.0
    scale = torch.exp2(torch.randint(-2, 3, (count, size, 1), generator=generator).float())
    return torch.eye(size)[order] * signs * scale


def feedback_numbers(kind: str, format: str, width: int, generator: torch.Generator) -> Tensor:
    """`feedback` bf16 [K/G, 6, G/4] of numbers up to 0.9, of `zeros`, or of `eighths`.

    Eighths, small integers and a transform of ±1, or of powers of two, have exact sums of errors: relative to a group's
    largest value they have less than 24 bits.
    """
    shape = feedback.shape(format, width)
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.bfloat16)
    if kind == "eighths":
        return (torch.randint(-7, 8, shape, generator=generator) / 8).to(torch.bfloat16)
    return (torch.rand(shape, generator=generator) * 1.8 - 0.9).to(torch.bfloat16)


def factors_of_rows(rows: int, generator: torch.Generator) -> Tensor:
    """bf16 [rows] in [1, 2): every number there is as likely."""
    return (torch.randint(128, 256, (rows,), generator=generator) / 128).to(torch.bfloat16)


class Draw:
    """Random numbers and operands of one family."""

    def __init__(self, seed: int, index: int, device: torch.device):
        self.random = random.Random(f"{seed} {index}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**62))
        self.device = device
        self.small = device.type == "cpu"

    def of(self, *choices):
        return self.random.choice(choices)

    def size(self, most: int) -> int:
        """From 1 to most, every octave equally likely; often next to a power of two, where tiles end."""
        value = int(2 ** self.random.uniform(0, math.log2(most + 0.999)))
        if self.random.random() < 0.4:
            value = 2 ** round(math.log2(value)) + self.of(-1, 0, 0, 1)
        return max(1, min(most, value))

    def rows(self, width: int) -> list[int]:
        most = max(1, min(300 if self.small else 5000, MOST_VALUES // width))
        return [self.size(most) for _ in range(3 if self.small else ROWS)]

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype).to(self.device)

    def strided(self, x: Tensor) -> Tensor:
        """The same rows, now and then as a part of wider ones."""
        return torch.cat([x, x[..., :64]], -1)[..., : x.shape[-1]] if self.of(True, False) else x

    def values(self, rows: int, k: int, dtype: torch.dtype) -> Tensor:
        """Rows of many magnitudes, with zeros of both signs, ties, and a few values that are not finite."""
        octaves = torch.randint(-9, 10, (rows, -(-k // 16)), generator=self.generator).repeat_interleave(16, 1)[:, :k]
        x = torch.randn(rows, k, generator=self.generator) * torch.exp2(octaves.float())
        x[torch.rand(rows, k, generator=self.generator) < 0.1] *= 0.0
        kind = torch.randint(0, 8, (rows,), generator=self.generator)
        x[kind == 0] = 0.0
        x[kind == 1] = (x[kind == 1] * 4).round() / 4  # ties of a scale of 1
        x[kind == 2] *= 2.0**-12
        for _ in range(self.of(0, 0, 1, 3)):
            row, column = self.random.randrange(rows), self.random.randrange(k)
            x[row, column] = self.of(float("nan"), float("inf"), -float("inf"), 3e38)
        return self.strided(x.to(dtype).to(self.device))

    def transform(self, k: int, unit: int, dtype: torch.dtype) -> Tensor | None:
        """`signed_permutations`, or None."""
        sizes = [b for b in (unit, 2 * unit, 64, 128) if k % b == 0 and b % unit == 0]
        kind = self.of("none", "shared", "blocks", "blocks")
        if kind == "none" or not sizes:
            return None
        size = self.of(*sizes)
        count = 1 if kind == "shared" else k // size
        return signed_permutations(count, size, self.generator).to(dtype).to(self.device)

    def feedback(self, format: str, rule: str, k: int) -> tuple[str, Tensor | None]:
        """(kind, `feedback`): none in half of the calls, and where the format takes none."""
        kind = self.of("none", "none", "none", "any", "eighths", "zeros")
        if kind == "none" or format not in feedback.FORMATS or rule == "paper":
            return "none", None
        return kind, feedback_numbers(kind, format, k, self.generator).to(self.device)

    def whole(self, rows: int, k: int, dtype: torch.dtype) -> Tensor:
        """Small integers."""
        return self.strided(torch.randint(-24, 25, (rows, k), generator=self.generator).to(dtype).to(self.device))

    def scalar(self, *choices: float | None) -> Tensor | None:
        g = self.of(*choices)
        return None if g is None else torch.tensor([g], device=self.device)

    def width(self, unit: int, most: int) -> int:
        return unit * self.size(most // unit)
