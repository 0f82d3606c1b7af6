"""Measures the phases of a run: `with phase("GPTQ"):` around a piece of work, `with timing() as seconds:` around all.

Phases nest, and each second counts for the innermost one. Outside `timing` a phase costs nothing. Only phases of the
thread that entered `timing` count.
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
    """Charges the time of the block to `name`, without the time of phases inside the block."""
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
    """Yields seconds by phase, which fill up while the block runs.

    `synchronize` waits for the GPU wherever a phase begins or ends. The times are then exact, but transfers and kernels
    of different phases cannot overlap.
    """
    clock = _Clock(synchronize)
    _clocks.append(clock)
    try:
        yield clock.seconds
    finally:
        _clocks.remove(clock)


def current() -> str | None:
    """The innermost open phase of a run that is timed, from any thread; None outside of phases."""
    return next((clock.open[-1] for clock in reversed(_clocks) if clock.open[-1:]), None)
