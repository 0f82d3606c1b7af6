"""Facts of a weight that Triton's kernels remember (`kernels/facts.py`), and the workspace of a device."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...facts import lasting, remembered

# e4m3 holds scales exactly down to so many octaves below the largest of their row.
E4M3_WINDOW = 14


@functools.cache
def multiprocessors(device: int) -> int:
    """How many a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class RowFacts(NamedTuple):
    """Of e8m0 weight scales: the largest byte of every row (uint8 [N]), and whether e4m3 holds every row exactly."""

    top: Tensor
    fits_e4m3: bool


def _row_facts(scales: Tensor) -> RowFacts:
    top = scales.amax(-1)
    # Groups of zeros have byte 1. It does not count, unless the row itself is that small.
    low = torch.where((scales > 1) | (top[:, None] < 32), scales, 255).amin(-1)
    return RowFacts(top, bool((top.to(torch.int16) - low.to(torch.int16) <= E4M3_WINDOW).all()))


def fits_e4m3(scales: Tensor) -> bool:
    """Whether e4m3 holds every row of weight scales uint8 [N, K/32]; not remembered."""
    return _row_facts(scales).fits_e4m3


def row_facts(scales: Tensor) -> RowFacts:
    """`RowFacts` of weight scales uint8 [N, K/32]; remembered.

    The first call reads one number back from the device. During the capture of a CUDA graph this is impossible: then
    `fits_e4m3` is False, and nothing is remembered."""
    return remembered(scales, "rows", _row_facts, lambda t: RowFacts(t.amax(-1), False))


def _scale_words(scales: Tensor) -> Tensor:
    return torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4)).view(torch.int32)


def scale_words(scales: Tensor) -> Tensor:
    """Scale bytes uint8 [.., S] as int32 [.., ceil(S/4)]. Rows that are no whole words are filled up with zeros, in a
    copy that is remembered."""
    if scales.shape[-1] % 4 == 0:
        return scales.view(torch.int32)
    return remembered(scales, "words", _scale_words, _scale_words)


def _is_power_of_two(g: Tensor) -> bool:
    return math.frexp(g.item())[0] == 0.5


def is_power_of_two(g: Tensor | None) -> bool:
    """Whether dividing by a global scale only changes exponents; remembered. False if a capture forbids reading the
    scale, and of factors of rows (bf16), which are many."""
    return g is None or (g.dtype == torch.float32 and remembered(g, "power", _is_power_of_two, lambda t: False))


class Workspace:
    """Constants and arrival counters of a device.

    The counters of a call are the next slice of a ring, and are zero again when the call ends. The ring is so long
    that a slice is free again long before its next turn, on whatever streams the calls run."""

    RING = 2**20

    def __init__(self, device: torch.device):
        # `prmt` selectors: byte i of a word alone (MXFP4), twice each (MXFP4 in bf16), byte i in both halves (NVFP4).
        self.selectors = torch.arange(0x4440, 0x4444, dtype=torch.int32, device=device)
        self.twice = self.selectors.repeat_interleave(2)
        self.pairs = torch.arange(4, dtype=torch.int32, device=device) * 0x0101 + 0x4040
        self._ring = torch.zeros(self.RING, dtype=torch.int32, device=device)
        self._next = 0

    def counters(self, n: int) -> Tensor:
        """int32 [n], all zeros, aligned to 16 bytes; n <= RING."""
        size = -(-n // 4) * 4  # Triton compiles once more for pointers that are not aligned
        if self._next + size > self.RING:
            self._next = 0
        start, self._next = self._next, self._next + size
        return self._ring[start : start + n]


_workspaces: dict[int, Workspace] = {}


def workspace(device: torch.device) -> Workspace:
    found = _workspaces.get(device.index)
    if found is None:
        found = lasting(functools.partial(Workspace, device), device)
        # Memory of a CUDA graph must not outlive the graph here.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _workspaces[device.index] = found
    return found
