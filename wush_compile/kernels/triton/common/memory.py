"""What Triton's products remember: facts of a weight, kept with its memory until it is written, and a device's workspace."""

import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger("wush_compile")
# Octaves below a row's largest scale byte that e4m3 still holds exactly.
E4M3_WINDOW = 14


class RowFacts(NamedTuple):
    """Of a weight's e8m0 scales: the largest byte of every row (uint8 [N]), whether e4m3 holds every row exactly."""

    top: Tensor
    fits_e4m3: bool


def _memory(t: Tensor) -> dict:
    """What is remembered of a tensor: kept with its memory, empty again once it has been written."""
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
    """`make()`, whose tensors may be kept. While Inductor warms a CUDA graph up, what a thread allocates belongs to the
    graph, which takes it back unasked: another thread's memory does not."""
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
    # Byte 1 is what groups of zeros have; where the row is not itself that small it is worth nothing.
    low = torch.where((scales > 1) | (top[:, None] < 32), scales, 255).amin(-1)
    return RowFacts(top, bool((top.to(torch.int16) - low.to(torch.int16) <= E4M3_WINDOW).all()))


def row_facts(scales: Tensor) -> RowFacts:
    """`RowFacts` of weight scales uint8 [N, K/32]; remembered.

    The first call reads one number back from the device; inside a CUDA graph's capture, where that is impossible,
    nothing is remembered and the row is taken not to fit."""
    memory = _memory(scales)
    if "rows" not in memory:
        if _capturing(scales):
            _warn_capturing()
            return RowFacts(scales.amax(-1), False)
        memory["rows"] = _lasting(functools.partial(_row_facts, scales), scales.device)
    return memory["rows"]


def is_power_of_two(g: Tensor | None) -> bool:
    """Whether dividing by a global scale only changes exponents; remembered. False where it cannot be looked at."""
    if g is None:
        return True
    memory = _memory(g)
    if "power" not in memory:
        if _capturing(g):
            return False
        memory["power"] = math.frexp(g.item())[0] == 0.5
    return memory["power"]


def settled(t: Tensor) -> bool:
    """Whether a weight has been used before and not been written since; a use is remembered. Only such a one may be read
    while the kernel in front still runs, which might be the one that writes it."""
    memory = _memory(t)
    return "used" in memory or memory.setdefault("used") is not None


class Workspace:
    """Constants and arrival counters of a device.

    The counters of a call are the next slice of a ring and are zero again when it ends, so a slice is free long before
    its next turn, whatever streams the calls run on."""

    RING = 2**20

    def __init__(self, device: torch.device):
        # `prmt` selectors: byte i of a word alone (MXFP4), byte i in both halves (NVFP4).
        self.selectors = torch.arange(0x4440, 0x4444, dtype=torch.int32, device=device)
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
        # A graph's own memory must not outlive it here.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            _workspaces[device.index] = found
    return found
