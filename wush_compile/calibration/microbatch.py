"""Chooses how many sequences go through a stage at once, and regroups the batches accordingly."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, fx

from ..data import Batch
from ..passes.calibration.partition import Stage

# More tokens at once take more memory, but do not make a GPU's matmuls faster.
MAX_TOKENS = 16384
# The share of free memory for a stage's values. The rest is for its weights, its moments and the solver.
VALUES_SHARE = 0.5


@dataclass
class MicroBatch:
    """The inputs of one forward, and the numbers of the user's batches that they come from.

    units   the numbers of its sequences; a batch that cannot be split into sequences counts as one
    """

    inputs: Batch
    origin: range
    units: range

    def __str__(self) -> str:
        first, last = self.origin[0], self.origin[-1]
        return f"batch {first}" if first == last else f"one of the batches {first} to {last}"

    def tokens(self) -> int:
        """Returns the number of tokens in `input_ids`, or else of rows in the first input."""
        values = self.inputs if isinstance(self.inputs, Mapping) else dict(enumerate(self.inputs))
        first = values.get("input_ids", next(iter(values.values())))
        return first.numel() if "input_ids" in values else math.prod(first.shape[:-1])


def sequences(batch: Batch) -> int | None:
    """Returns how many sequences a batch of a language model has, or None if it cannot be split into sequences."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or any(not isinstance(v, Tensor) or v.dim() == 0 or len(v) != len(ids) for v in batch.values()):
        return None
    return len(ids)


def regroup(batches: list[Batch], batch_size: int | None) -> list[MicroBatch]:
    """Returns the same sequences in the same order, up to `batch_size` of equal length together.

    None keeps the batches as they are. A batch that cannot be split stays whole.
    """
    if batch_size is None:
        ends = list(accumulate(sequences(batch) or 1 for batch in batches))
        units = [range(a, b) for a, b in pairwise([0, *ends])]
        return [MicroBatch(batch, range(i, i + 1), units[i]) for i, batch in enumerate(batches)]
    grouped: list[MicroBatch] = []
    pending: list[tuple[int, Batch]] = []

    def add(inputs: Batch, origin: range, count: int) -> None:
        first = grouped[-1].units.stop if grouped else 0
        grouped.append(MicroBatch(inputs, origin, range(first, first + count)))

    def flush() -> None:
        if pending:
            joined = {name: torch.cat([sequence[name] for _, sequence in pending]) for name in pending[0][1]}
            add(joined, range(pending[0][0], pending[-1][0] + 1), len(pending))
            pending.clear()

    for i, batch in enumerate(batches):
        count = sequences(batch)
        if count is None:
            flush()
            add(batch, range(i, i + 1), 1)
            continue
        for s in range(count):
            sequence = {name: value[s : s + 1] for name, value in batch.items()}
            if pending and any(sequence[name].shape != value.shape for name, value in pending[0][1].items()):
                flush()
            pending.append((i, sequence))
            if len(pending) == batch_size:
                flush()
    flush()
    return grouped


def traced_bytes(value: object) -> int:
    """Returns the size of a traced value in bytes, with symbolic sizes as in the example input."""
    if not isinstance(value, torch.Tensor):
        return sum(map(traced_bytes, value)) if isinstance(value, tuple | list) else 0
    hints = (s if isinstance(s, int) else s.node.hint for s in value.shape)
    return math.prod(hints) * value.element_size()


def _peak(graph: fx.Graph) -> int:
    """Returns the peak of a stage's live values in bytes, without weights."""
    last_use = {used: i for i, node in enumerate(graph.nodes) for used in node.all_input_nodes}
    alive, total, peak = {}, 0, 0
    for i, node in enumerate(graph.nodes):
        if node.op != "get_attr":
            alive[node] = traced_bytes(node.meta.get("val"))
            total += alive[node]
            peak = max(peak, total)
        for used in node.all_input_nodes:
            if last_use[used] == i:
                total -= alive.pop(used, 0)
    return peak


def largest_batch(limit: int, length: int) -> int:
    """Returns the largest power of two within `limit` sequences and within `MAX_TOKENS` tokens; at least 1."""
    return 2 ** (max(1, min(limit, MAX_TOKENS // length)).bit_length() - 1)


def choose_batch_size(
    batches: list[Batch], stages: list[Stage], placeholders: list[fx.Node], device: torch.device
) -> int | None:
    """Chooses the micro-batch size for a GPU by its free memory.

    Returns None (batches as they are) on a CPU, or if a batch cannot be split.

    placeholders   those of the graph; `input_ids` tells how many tokens the sizes in the stages are for
    """
    counts = [sequences(batch) for batch in batches]
    if device.type != "cuda" or None in counts:
        return None
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    example = next(p.meta["val"] for p in placeholders if p.name == "input_ids")
    tokens = traced_bytes(example) // example.element_size()
    free, _ = torch.cuda.mem_get_info(device)
    # Calibration keeps fp32 copies of what it observes and quantizes, hence twice the graph's own values.
    each = 2 * max(_peak(s.graph_module.graph) for s in stages[:-1] or stages) / tokens * longest
    return largest_batch(min(int(VALUES_SHARE * free / max(each, 1)), sum(counts)), longest)
