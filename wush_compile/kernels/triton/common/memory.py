"""What Triton's kernels remember: facts of a weight, until the weight is written, and the workspace of a device."""

import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("wush_compile")
# e4m3 holds scales exactly down to so many octaves below the largest of their row.
E4M3_WINDOW = 14


class RowFacts(NamedTuple):
    """Of e8m0 weight scales: the largest byte of every row (uint8 [N]), and whether e4m3 holds every row exactly."""

    top: Tensor
    fits_e4m3: bool


def _memory(t: Tensor) -> dict:
    """The facts remembered of a tensor. They are kept with the tensor's storage, and are dropped once it has been
    written."""
    storage = t.untyped_storage()
    if not hasattr(storage, "_wush_memory"):
        storage._wush_memory = {}
    place, version = (t.storage_offset(), t.shape), -1 if t.is_inference() else t._version
    known, facts = storage._wush_memory.get(place, (None, None))
    if known != version:
        facts = {}
        storage._wush_memory[place] = version, facts
    return facts


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _warn_capturing() -> None:
    logger.warning(
        "a weight is used for the first time while a CUDA graph is captured: it runs on a slower kernel in "
        "that graph; run the model once before capturing"
    )


def _lasting(make: Callable, device: torch.device):
    """`make()`, with tensors that may be kept. While Inductor warms up a CUDA graph, memory allocated on this thread
    joins the graph's pool and is reclaimed with it. So another thread allocates."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()
    stream = torch.cuda.current_stream(device)

    def elsewhere():
        with torch.cuda.stream(stream), torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(elsewhere).result()


def _row_facts(scales: Tensor) -> RowFacts:
    top = scales.amax(-1)
    # Groups of zeros have byte 1. It does not count, unless the row itself is that small.
    low = torch.where((scales > 1) | (top[:, None] < 32), scales, 255).amin(-1)
    return RowFacts(top, bool((top.to(torch.int16) - low.to(torch.int16) <= E4M3_WINDOW).all()))


def row_facts(scales: Tensor) -> RowFacts:
    """`RowFacts` of weight scales uint8 [N, K/32]; remembered.

    The first call reads one number back from the device. During the capture of a CUDA graph this is impossible: then
    `fits_e4m3` is False, and nothing is remembered."""
    memory = _memory(scales)
    if "rows" not in memory:
        if _capturing(scales):
            _warn_capturing()
            return RowFacts(scales.amax(-1), False)
        memory["rows"] = _lasting(functools.partial(_row_facts, scales), scales.device)
    return memory["rows"]


def scale_words(scales: Tensor) -> Tensor:
    """Scale bytes uint8 [.., S] as int32 [.., ceil(S/4)]. Rows that are no whole words are filled up with zeros, in a
    copy that is remembered."""
    if scales.shape[-1] % 4 == 0:
        return scales.view(torch.int32)
    memory = _memory(scales)
    if "words" in memory:
        return memory["words"]

    def make():
        return torch.nn.functional.pad(scales, (0, -scales.shape[-1] % 4)).view(torch.int32)

    if _capturing(scales):
        _warn_capturing()
        return make()
    memory["words"] = _lasting(make, scales.device)
    return memory["words"]


def is_power_of_two(g: Tensor | None) -> bool:
    """Whether dividing by a global scale only changes exponents; remembered. False if a capture forbids reading the
    scale."""
    if g is None:
        return True
    memory = _memory(g)
    if "power" not in memory:
        if _capturing(g):
            return False
        memory["power"] = math.frexp(g.item())[0] == 0.5
    return memory["power"]


def mark_used_and_was_settled(t: Tensor) -> bool:
    """Returns False on the first use of a weight, and records the use; True afterwards, until the weight is written.

    Only after True may a kernel read the weight before the kernel in front ends: that one might write it."""
    memory = _memory(t)
    return "used" in memory or memory.setdefault("used") is not None


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
        found = _lasting(functools.partial(Workspace, device), device)
        # Memory of a CUDA graph must not outlive the graph here.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _workspaces[device.index] = found
    return found
