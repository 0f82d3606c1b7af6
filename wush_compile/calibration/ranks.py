"""One calibration by several processes, each with a device of its own: `torchrun --nproc-per-node 2 script.py`.

The windows are dealt out, moments are summed where their group will be solved, a stage's groups are solved on different
ranks, and every rank gets the bytes of all. Processes meet between these steps: a rank that failed says so there, and
the others stop with its error instead of waiting for it.
"""

import atexit
import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..data import Batch
from ..errors import DataError, WushError
from ..ops.core import LARGEST_SHARE, _sample_largest
from ..passes.calibration.observe import Observation
from .fingerprint import fingerprint_of_data
from .microbatch import sequences

T = TypeVar("T")
log = logging.getLogger("wush_compile")
# What torchrun and accelerate tell each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SingleProcess:
    """The team of one process. Others have the same methods and attributes."""

    rank, size = 0, 1

    def connect(self) -> None:
        """Makes the connections to the others that `reduce` and `solve` use, so that these need not; may be left out."""

    def share(self, batches: list[Batch]) -> list[Batch]:
        """The batches that this rank runs; together the ranks run each batch once."""
        return batches

    def smallest(self, number: int) -> int:
        """The least of all ranks' numbers; waits for every rank."""
        return number

    def reduce(self, seen: Mapping[int, Observation], costs: Mapping[int, float]) -> None:
        """Makes the observations of a stage those of all ranks' batches, in place. By group number: what was seen, and what
        solving the group costs, in any unit."""

    def solve(self, numbers: Iterable[int], solve: Callable[[int], T]) -> dict[int, T]:
        """`solve(number)` of each group of a stage, from one rank each; every rank gets identical results of all."""
        return {number: solve(number) for number in numbers}

    def fail(self, error: Exception) -> None:
        """Tells the others, who wait in one of the calls above, that this rank stops with an error."""


SINGLE_PROCESS = SingleProcess()


def launched() -> bool:
    """Whether this process is one of several, by its process group or by the environment that torchrun sets."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(device: torch.device) -> torch.device:
    """The device of this process, where `device` is all that is asked for: `cuda` becomes the GPU of its local rank."""
    if launched() and device.type == "cuda" and device.index is None:
        # Some launchers show each process its own GPU alone.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
    return device


def join(device: torch.device) -> SingleProcess:
    """The team of this process, which computes on `device`; SINGLE_PROCESS where there is only one. Makes the process group of a
    launched process that has none."""
    if not launched():
        return SINGLE_PROCESS
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()  # both backends: gloo for CPU tensors, NCCL for a GPU's
        atexit.register(_leave)
    return Ranks(device)


def _leave() -> None:
    with contextlib.suppress(Exception):  # the other processes may be gone, or who has launched this one left
        dist.destroy_process_group()


def merge_samples(samples: list[Tensor], counts: list[int]) -> Tensor:
    """One sample [R, K] of several, each of `counts` rows: shares of the uniform part by rows, the largest of the rest.

    A function of its arguments alone. Ranks alternate in the uniform part, so that every stretch of it is of all.
    """
    rows = samples[0].shape[0]
    kept = rows // LARGEST_SHARE
    capacity, total = rows - kept, sum(counts)
    merged = torch.zeros_like(samples[0])
    slots = min(capacity, total)
    ends = [slots * sum(counts[: r + 1]) // max(total, 1) for r in range(len(counts))]
    picks = []  # (place among the rank's own, rank, its slot)
    for r, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        filled, share = min(counts[r], capacity), end - begin
        picks += [((j + 0.5) / share, r, j * filled // share) for j in range(share)]
    picks.sort()
    for r, sample in enumerate(samples):
        here = [(place, slot) for place, (_, rank, slot) in enumerate(picks) if rank == r]
        if here:
            places, sources = (torch.tensor(index, device=sample.device) for index in zip(*here, strict=True))
            merged[places] = sample[sources]
    if kept:
        _sample_largest(torch.cat([sample[capacity:] for sample in samples]), merged[capacity:])
    return merged


class Ranks(SingleProcess):
    """The team of a process group, of which every process calls the same methods in the same order."""

    def __init__(self, device: torch.device):
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        # Short messages go by a group of their own on the CPU: there the death of a peer is an error at once.
        self._control = dist.new_group(backend="gloo")
        self._owners: dict[int, int] = {}
        self._over = False

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._over = True
            raise WushError(
                f"rank {self.rank} lost another process of the job, which has died or cannot be reached; with --out "
                "the finished stages are kept: start the same command again"
            ) from error

    def _exchange(self, mine: object, error: Exception | None = None) -> list:
        """Every rank's `mine`; a WushError where a rank failed."""
        everybody: list = [None] * self.size
        with self._contact():
            dist.all_gather_object(everybody, (mine, None if error is None else str(error)), group=self._control)
        failed = [(rank, message) for rank, (_, message) in enumerate(everybody) if message is not None]
        if failed:
            self._over = True
            rank, message = failed[0]
            if error is not None:
                raise error
            raise WushError(f"rank {rank}: {message}")
        return [value for value, _ in everybody]

    def fail(self, error: Exception) -> None:
        """Tells the others, who wait in `smallest` or `solve`, that this rank stops."""
        if not self._over:
            with contextlib.suppress(Exception):
                self._exchange(None, error)

    def connect(self) -> None:
        """NCCL's communicator is made in its first collective, and takes a second."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    def share(self, batches: list[Batch]) -> list[Batch]:
        """This rank's stretch of all sequences; of batches, where they cannot be taken apart."""
        if len(set(self._exchange(fingerprint_of_data(batches)))) > 1:
            raise DataError(
                "the processes have different calibration data: give each the same, of which it takes its part"
            )
        counts = [sequences(batch) for batch in batches]
        cut = None not in counts
        counts = counts if cut else [1] * len(batches)
        total = sum(counts)
        if total < self.size:
            kind = "windows" if cut else "batches"
            raise DataError(f"{total} calibration {kind} for {self.size} processes: each needs one")
        first, last = total * self.rank // self.size, total * (self.rank + 1) // self.size
        mine, start = [], 0
        for batch, count in zip(batches, counts, strict=True):
            low, high = max(first - start, 0), min(last - start, count)
            if low < high:
                whole = not cut or high - low == count
                mine.append(batch if whole else {name: value[low:high] for name, value in batch.items()})
            start += count
        return mine

    def smallest(self, number: int) -> int:
        return min(self._exchange(number))

    def reduce(self, seen: Mapping[int, Observation], costs: Mapping[int, float]) -> None:
        """After it the moment and the sample of a group are on the rank that solves it, its count everywhere."""
        self._owners = assign(costs, self.size)
        counts = self._exchange([int(observation.count) for observation in seen.values()])
        with self._contact():
            for position, (i, observation) in enumerate(seen.items()):
                own, owner = [c[position] for c in counts], self._owners[i]
                dist.reduce(observation.moment, owner)
                samples = [torch.empty_like(observation.sample) for _ in range(self.size if owner == self.rank else 0)]
                dist.gather(_bytes(observation.sample), list(map(_bytes, samples)) or None, owner)
                observation.count.fill_(sum(own))
                if samples:
                    observation.sample = merge_samples(samples, own)
                else:
                    observation.moment = observation.sample = None  # nobody reads it here: memory for the solver

    def solve(self, numbers: Iterable[int], solve: Callable[[int], T]) -> dict[int, T]:
        """Each result is a dataclass whose `group` is a module: its buffers are broadcast, the rest is pickled."""
        numbers = list(numbers)
        owners = {i: self._owners.get(i, position % self.size) for position, i in enumerate(numbers)}
        results, error = {}, None
        try:
            for i in numbers:
                if owners[i] == self.rank:
                    results[i] = solve(i)
        except Exception as caught:
            error = caught
        described = self._exchange({i: _without_values(result) for i, result in results.items()}, error)
        with self._contact():
            for i in numbers:
                if owners[i] != self.rank:
                    results[i] = described[owners[i]][i]
                    group = results[i].group
                    for name, buffer in group.named_buffers():
                        setattr(group, name, torch.empty_like(buffer, device=self.device))
                for buffer in results[i].group.buffers():
                    dist.broadcast(_bytes(buffer), owners[i])
        return {i: results[i] for i in numbers}


def assign(costs: Mapping[int, float], size: int) -> dict[int, int]:
    """Group number -> the rank that solves it: the dearest first, each to the rank that has least to do."""
    load, owners = [0.0] * size, {}
    for i in sorted(costs, key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def _bytes(tensor: Tensor) -> Tensor:
    """Its memory: collectives of bytes work for every dtype on every backend."""
    return tensor.reshape(-1).view(torch.uint8)


def _without_values(result: T) -> T:
    """A copy whose group has buffers without values, to be pickled."""
    light = copy.copy(result)
    light.group = copy.copy(result.group)
    light.group._buffers = {
        name: None if b is None else torch.empty_like(b, device="meta") for name, b in result.group._buffers.items()
    }
    return light
