"""Shows the progress of a run: one bar and a machine-readable log."""

import json
import math
import os
import resource
import sys
import time

import torch
from tqdm.asyncio import tqdm as terminal_tqdm
from tqdm.auto import tqdm


def memory(device: torch.device) -> int:
    """Returns the peak memory so far in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Lines:
    """Stands for the bar where the output is no terminal: a line now and then, with the same content."""

    INTERVAL = 15.0  # seconds
    disable = False

    def __init__(self, total: int, desc: str):
        self.n, self.total, self._desc, self._where = 0, total, desc, ""
        self._start = self._printed = time.perf_counter()

    def reset(self, total: int) -> None:
        self.n, self.total = 0, total

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self._where = text

    def update(self, steps: int) -> None:
        self.n += steps
        now = time.perf_counter()
        if steps and (now - self._printed >= self.INTERVAL or self.n == self.total):
            self._printed, taken = now, now - self._start
            took, left = (tqdm.format_interval(t) for t in (taken, taken * (self.total - self.n) / self.n))
            line = f"{self._desc}: {self.n}/{self.total}, {self._where}, {took} so far, {left} left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _is_terminal() -> bool:
    """Whether a bar can be drawn: in a terminal, or in a notebook, for which tqdm has another class."""
    return sys.stderr.isatty() or tqdm is not terminal_tqdm


class Progress:
    """The bar and the log of one run.

    title   what the bar says is done
    bar     whether to show the bar; where the output is no terminal, lines
    log     a file that gets one JSON object per line: `event` (run, stage, group, batch_size, resumed, finished,
            failed), `time` in seconds since the start, and the fields that docs/guide/large_models.md lists
    """

    def __init__(self, bar: bool = True, log: str | os.PathLike | None = None, title: str = "quantizing"):
        self.title, self.shown = title, bar
        self._log = None if log is None else open(log, "a", encoding="utf-8")  # noqa: SIM115
        self._start, self._tokens, self._since = time.perf_counter(), 0, None
        self._bar: tqdm | _Lines | None = None
        self._device, self._at = torch.device("cpu"), ""

    def begin(self, steps: int, device: torch.device, unit: str) -> None:
        """Starts the bar, or restarts it with another length."""
        self._device = device
        if self._bar is None and self.shown and not _is_terminal():
            self._bar, self._since = _Lines(steps, self.title), time.perf_counter()
        elif self._bar is None:
            # With smoothing=0, the estimate of the time left also counts the solver's pauses.
            self._bar = tqdm(total=steps, desc=self.title, unit=unit, disable=not self.shown, smoothing=0)
            self._since = time.perf_counter()
        else:
            self._bar.reset(steps)

    def advance(self, tokens: int = 0, steps: int = 1) -> None:
        """Advances the bar, and counts tokens."""
        self._tokens += tokens
        if self._bar is not None:
            self._describe(refresh=False)
            self._bar.update(steps)

    def at(self, stage: str, group: str | None = None, loss: float | None = None) -> None:
        """Shows where the run is. `loss` is the last group's relative loss."""
        parts = [stage] + ([group.rpartition(".")[2]] if group else [])
        if loss is not None and not math.isnan(loss):
            parts.append(f"loss {loss:.2e}")
        self._at = ", ".join(parts)
        self._describe(refresh=True)

    def note(self, text: str) -> None:
        """Shows a line above the bar."""
        if self.shown:
            tqdm.write(text, file=sys.stderr)

    def tokens_per_second(self) -> float:
        """Returns the tokens that went through a stage per second of forwards and solves."""
        return self._tokens / max(time.perf_counter() - self._since, 1e-9) if self._since else 0.0

    def event(self, event: str, **fields: object) -> None:
        """Writes a line of the log."""
        if self._log is not None:
            fields = {"event": event, "time": round(time.perf_counter() - self._start, 4), **fields}
            self._log.write(json.dumps(fields, default=str) + "\n")
            self._log.flush()

    def close(self) -> None:
        """Closes the bar and the log."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _describe(self, refresh: bool) -> None:
        if self._bar is None or self._bar.disable:
            return
        speed = f", {self.tokens_per_second():.0f} tokens/s" if self._tokens else ""
        self._bar.set_postfix_str(f"{self._at}{speed}, {memory(self._device) / 2**30:.1f} GiB", refresh=refresh)
