"""Runs one calibration on several processes, each with its own device: `torchrun --nproc-per-node 2 script.py`.

Each rank runs a share of the windows. The moments of a group are summed on the rank that will solve it. The ranks solve
different groups of a stage, and every rank then gets all solutions, byte for byte. The processes synchronize between
these steps. A rank that has failed reports its error there, so the others stop with it and do not wait.
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
from .solve_experts import shares

T = TypeVar("T")
# A piece of a stage's work: the number of a group, and a share of its experts, or 0. Share -1 is what experts share.
Unit = tuple[int, int]
log = logging.getLogger("wush_compile")
# Environment variables that torchrun and accelerate set for each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class SingleProcess:
    """A run on one process. `Ranks` has the same methods and attributes."""

    rank, size = 0, 1

    def connect(self) -> None:
        """Opens the connections in advance. Optional: `reduce` and `solve` open them on demand."""

    def share(self, batches: list[Batch]) -> list[Batch]:
        """Returns the batches that this rank runs. Together the ranks run each batch once."""
        return batches

    def smallest(self, number: int) -> int:
        """Returns the smallest number of all ranks. Waits for every rank."""
        return number

    def gather(self, mine: T) -> list[T]:
        """Returns what every rank gives, in the order of the ranks."""
        return [mine]

    def reduce(self, seen: Mapping[int, Observation], costs: Mapping[Unit, float]) -> None:
        """Combines the observations of a stage over all ranks, in place.

        seen    group number -> what this rank observed
        costs   unit of work (group number, share of its experts) -> cost of solving it, in any unit
        """

    def solve(self, units: Iterable[Unit], solve: Callable[[Unit], T]) -> dict[Unit, T]:
        """Calls `solve(unit)` for each unit of a stage's work, each on one rank. All ranks get identical results."""
        return {unit: solve(unit) for unit in units}

    def fail(self, error: Exception) -> None:
        """Tells the other ranks, which wait in one of the calls above, that this rank stops with an error."""


SINGLE_PROCESS = SingleProcess()


def launched() -> bool:
    """Tells whether this process is one of several, by its process group or by the environment from torchrun."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return all(name in os.environ for name in LAUNCHED) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(device: torch.device) -> torch.device:
    """Resolves `cuda` without an index to the GPU of this process (LOCAL_RANK)."""
    if launched() and device.type == "cuda" and device.index is None:
        # Some launchers make only one GPU visible to each process, hence the remainder.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(torch.cuda.device_count(), 1))
    return device


def join(device: torch.device) -> SingleProcess:
    """Returns the ranks of a run that computes on `device`, or SINGLE_PROCESS if there is only one process.

    Creates the process group if a launched process has none.
    """
    if not launched():
        return SINGLE_PROCESS
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group()  # both backends: gloo for CPU tensors, NCCL for GPU tensors
        atexit.register(_leave)
    return Ranks(device)


def _leave() -> None:
    with contextlib.suppress(Exception):  # another process or the launcher may be gone
        dist.destroy_process_group()


def merge_samples(samples: list[Tensor], counts: list[int]) -> Tensor:
    """Merges the ranks' samples [R, K] into one. `counts` has the number of rows that each rank observed.

    In the uniform part, each rank's share is proportional to its count. The other rows are the largest of all ranks.
    The result is deterministic. The ranks alternate in the uniform part, so that any stretch of it has rows of all.
    """
    rows = samples[0].shape[0]
    kept = rows // LARGEST_SHARE
    capacity, total = rows - kept, sum(counts)
    merged = torch.zeros_like(samples[0])
    slots = min(capacity, total)
    ends = [slots * sum(counts[: r + 1]) // max(total, 1) for r in range(len(counts))]
    picks = []  # (relative place in the rank's share, rank, the rank's slot)
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
    """The processes of a process group. Every process must call the same methods in the same order."""

    def __init__(self, device: torch.device):
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        # Short messages use a separate group on the CPU, where the death of a peer raises an error at once.
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
        """Returns every rank's `mine`. Raises this rank's `error`, or a `WushError` if another rank failed."""
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
        """Tells the other ranks, which wait in `smallest` or `solve`, that this rank stops."""
        if not self._over:
            with contextlib.suppress(Exception):
                self._exchange(None, error)

    def connect(self) -> None:
        """Creates NCCL's communicator, which takes a second, by a first collective."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    def share(self, batches: list[Batch]) -> list[Batch]:
        """Returns this rank's contiguous share of all sequences, or of all batches if one cannot be split."""
        if len(set(self._exchange(fingerprint_of_data(batches)))) > 1:
            raise DataError(
                "the processes have different calibration data: give all the same data, and each runs its share"
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

    def gather(self, mine: T) -> list[T]:
        """Returns what every rank gives, in the order of the ranks."""
        return self._exchange(mine)

    def reduce(self, seen: Mapping[int, Observation], costs: Mapping[int, float]) -> None:
        """Leaves a group's moment and sample on the rank that solves it, and its count on every rank.

        The moment of a share of experts stays on the rank that solves it; every rank gets the rest of what is seen.
        """
        self._owners = assign(costs, self.size)
        counts = self._exchange([observation.count.cpu() for observation in seen.values()])
        with self._contact():
            for position, (i, observation) in enumerate(seen.items()):
                own = [c[position] for c in counts]
                observation.count.copy_(sum(own))
                if observation.expert is None:
                    self._reduce_linears(observation, [int(count) for count in own], self._owners[i, 0])
                else:
                    owners = [self._owners[unit] for unit in sorted(self._owners) if unit[0] == i]
                    self._reduce_experts(observation, [int(count.sum()) for count in own], owners)

    def _reduce_linears(self, observation: Observation, rows: list[int], owner: int) -> None:
        dist.reduce(observation.moment, owner)
        if observation.cross is not None:
            dist.reduce(observation.cross, owner)
        samples = [torch.empty_like(observation.sample) for _ in range(self.size if owner == self.rank else 0)]
        dist.gather(_as_bytes(observation.sample), list(map(_as_bytes, samples)) or None, owner)
        if samples:
            observation.sample = merge_samples(samples, rows)
        else:
            observation.moment = observation.sample = observation.cross = None  # frees memory for the solver

    def _reduce_experts(self, observation: Observation, rows: list[int], owners: list[int]) -> None:
        pooled = observation.moment.sum(0, dtype=torch.float64)
        dist.all_reduce(pooled)
        observation.pooled = pooled.div_(max(sum(rows), 1))
        for share, owner in zip(shares(len(observation.moment), self.size), owners, strict=True):
            dist.reduce(observation.moment[share.start : share.stop], owner)
        for part in ("sample", "expert"):
            samples = [torch.empty_like(getattr(observation, part)) for _ in range(self.size)]
            dist.all_gather(list(map(_as_bytes, samples)), _as_bytes(getattr(observation, part)))
            # Which rows of the uniform part are merged depends on the counts alone.
            setattr(observation, part, merge_samples(samples, rows))

    def solve(self, units: Iterable[Unit], solve: Callable[[Unit], T]) -> dict[Unit, T]:
        """Broadcasts the results. Each is a dataclass with a module `group`: buffers go as bytes, the rest pickled."""
        units = list(units)
        owners = {i: self._owners.get(i, position % self.size) for position, i in enumerate(units)}
        results, error = {}, None
        try:
            for i in units:
                if owners[i] == self.rank:
                    results[i] = solve(i)
        except Exception as caught:
            error = caught
        described = self._exchange({i: _without_values(result) for i, result in results.items()}, error)
        with self._contact():
            for i in units:
                if owners[i] != self.rank:
                    results[i] = described[owners[i]][i]
                    group = results[i].group
                    for name, buffer in group.named_buffers():
                        setattr(group, name, torch.empty_like(buffer, device=self.device))
                for buffer in results[i].group.buffers():
                    dist.broadcast(_as_bytes(buffer), owners[i])
        return {i: results[i] for i in units}


def assign(costs: Mapping[T, float], size: int) -> dict[T, int]:
    """Returns unit of work -> solving rank: the most expensive unit first, each to the least loaded rank."""
    load, owners = [0.0] * size, {}
    for i in sorted(costs, key=lambda i: (-costs[i], i)):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def _as_bytes(tensor: Tensor) -> Tensor:
    """Returns a flat uint8 view, because collectives of bytes work for every dtype on every backend."""
    return tensor.reshape(-1).view(torch.uint8)


def _without_values(result: T) -> T:
    """Returns a copy to pickle, with the buffers of its group on the meta device."""
    light = copy.copy(result)
    light.group = copy.copy(result.group)
    light.group._buffers = {
        name: None if b is None else torch.empty_like(b, device="meta") for name, b in result.group._buffers.items()
    }
    return light
