"""How many sequences go through a stage at once."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..data import Batch
from ..passes.calibration.partition import Stage

# More tokens at once do not make a GPU's matmuls faster, only its memory fuller.
TOKENS = 16384
# The share of free memory for a stage's values; the rest is for its weights, moments and the solver.
SHARE = 0.5


@dataclass
class MicroBatch:
    """Inputs of one forward, and the numbers of the user's batches they come from."""

    inputs: Batch
    origin: range

    def __str__(self) -> str:
        first, last = self.origin[0], self.origin[-1]
        return f"batch {first}" if first == last else f"one of the batches {first} to {last}"

    def tokens(self) -> int:
        """Positions in it: of `input_ids`, or rows of the first input."""
        values = self.inputs if isinstance(self.inputs, Mapping) else dict(enumerate(self.inputs))
        first = values.get("input_ids", next(iter(values.values())))
        return first.numel() if "input_ids" in values else math.prod(first.shape[:-1])


def sequences(batch: Batch) -> int | None:
    """How many sequences a batch of a language model has; None where it cannot be taken apart."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or any(not isinstance(v, Tensor) or v.dim() == 0 or len(v) != len(ids) for v in batch.values()):
        return None
    return len(ids)


def regroup(batches: list[Batch], rows: int | None) -> list[MicroBatch]:
    """The same sequences in the same order, `rows` of equal length at a time; None leaves batches as they are."""
    if rows is None:
        return [MicroBatch(batch, range(i, i + 1)) for i, batch in enumerate(batches)]
    grouped: list[MicroBatch] = []
    pending: list[tuple[int, Batch]] = []

    def flush() -> None:
        if pending:
            joined = {name: torch.cat([row[name] for _, row in pending]) for name in pending[0][1]}
            grouped.append(MicroBatch(joined, range(pending[0][0], pending[-1][0] + 1)))
            pending.clear()

    for i, batch in enumerate(batches):
        count = sequences(batch)
        if count is None:
            flush()
            grouped.append(MicroBatch(batch, range(i, i + 1)))
            continue
        for r in range(count):
            row = {name: value[r : r + 1] for name, value in batch.items()}
            if pending and any(row[name].shape != value.shape for name, value in pending[0][1].items()):
                flush()
            pending.append((i, row))
            if len(pending) == rows:
                flush()
    flush()
    return grouped


def _bytes(value: object) -> int:
    """Of a traced value, symbols standing for what they were in the example."""
    if not isinstance(value, torch.Tensor):
        return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0
    hints = (s if isinstance(s, int) else s.node.hint for s in value.shape)
    return math.prod(hints) * value.element_size()


def _peak(graph: fx.Graph) -> int:
    """The most bytes of values that are alive at once in a stage, weights apart."""
    last_use = {used: i for i, node in enumerate(graph.nodes) for used in node.all_input_nodes}
    alive, total, peak = {}, 0, 0
    for i, node in enumerate(graph.nodes):
        if node.op != "get_attr":
            alive[node] = _bytes(node.meta.get("val"))
            total += alive[node]
            peak = max(peak, total)
        for used in node.all_input_nodes:
            if last_use[used] == i:
                total -= alive.pop(used, 0)
    return peak


def largest_batch(limit: int, length: int) -> int:
    """The micro-batch of sequences of this length where at most `limit` of them fit: a power of two."""
    return 2 ** (max(1, min(limit, TOKENS // length)).bit_length() - 1)


def choose_batch_size(
    batches: list[Batch], stages: list[Stage], placeholders: list[fx.Node], device: torch.device
) -> int | None:
    """The micro-batch for a GPU, from its free memory; None (batches as they are) on a CPU or for other inputs.

    `placeholders` are those of the graph, which tell what the sizes in the stages are for.
    """
    counts = [sequences(batch) for batch in batches]
    if device.type != "cuda" or None in counts:
        return None
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    example = next(p.meta["val"] for p in placeholders if p.name == "input_ids")
    tokens = _bytes(example) // example.element_size()
    free, _ = torch.cuda.mem_get_info(device)
    # Calibration keeps fp32 copies of what it observes and quantizes: twice what the graph itself holds.
    each = 2 * max(_peak(s.graph_module.graph) for s in stages[:-1] or stages) / tokens * longest
    return largest_batch(min(int(SHARE * free / max(each, 1)), sum(counts)), longest)
