"""Where the time of a run goes: `with phase("GPTQ"):` around a piece of work, `with timing() as seconds:` around the run.

Phases nest, and each second counts for the innermost one. Without `timing` a phase costs nothing. What other threads do
meanwhile is not counted.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

import torch


class _Clock:
    def __init__(self, synchronize: bool):
        self.seconds: dict[str, float] = {}
        self.synchronize, self.open, self.since = synchronize, [], time.perf_counter()
        self.thread = threading.get_ident()

    def switch(self) -> None:
        """Charges the time since the last switch to the innermost open phase."""
        if self.synchronize and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


_clocks: list[_Clock] = []


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Charges the time of the block to `name`, except what phases inside it take."""
    clocks = [clock for clock in _clocks if clock.thread == threading.get_ident()]
    for clock in clocks:
        clock.switch()
        clock.open.append(name)
    try:
        yield
    finally:
        for clock in clocks:
            clock.switch()
            clock.open.pop()


@contextlib.contextmanager
def timing(synchronize: bool = False) -> Iterator[dict[str, float]]:
    """Seconds by phase of what runs in the block. `synchronize` waits for the GPU wherever a phase begins or ends: exact,
    but it forbids transfers and kernels of different phases to overlap."""
    clock = _Clock(synchronize)
    _clocks.append(clock)
    try:
        yield clock.seconds
    finally:
        _clocks.remove(clock)
