"""A log of compiles: the graph after each pass, and the kernels that Inductor made of it.

    with wush_compile.trace_graphs() as log:
        torch.compile(model, backend="wush")(ids)
    log.print()

Compile inside the block: `trace_graphs` sees no graph that was compiled before.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import rich
import torch
from torch.fx import Graph

from .printing import count_ops, print_graph

_LOGS: list["GraphLog"] = []


@dataclass
class Snapshot:
    """A graph after one step."""

    step: str
    graph: Graph
    names: list[str] | None
    counts: Counter

    def text(self, layer: int | None = None) -> str:
        return print_graph(self.graph, self.names, layer)


@dataclass
class GraphTrace:
    """One graph on its way through the backend.

    snapshots   steps `dynamo` and `incoming`, then one for each pass
    kernels     Inductor's kernels, a line each
    """

    snapshots: list[Snapshot] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    def __getitem__(self, step: str) -> Snapshot:
        for snapshot in self.snapshots:
            if snapshot.step == step:
                return snapshot
        raise KeyError(f"no step {step!r}: the steps are {', '.join(s.step for s in self.snapshots)}")

    def text(self, after: str | None = None, layer: int | None = None) -> str:
        """The graph after one step. Without `after`: counts of all steps, the incoming graph, and the last one."""
        if after is not None:
            return self[after].text(layer)
        first, last = self["incoming"], self.snapshots[-1]
        steps = [f"{s.step:<18}{_counts(s.counts)}" for s in self.snapshots]
        parts = ["\n".join(steps), f"before\n{first.text(layer)}", f"after\n{last.text(layer)}"]
        if self.kernels:
            parts.append("kernels\n" + "\n".join(self.kernels))
        return "\n\n".join(parts)


def _counts(counts: Counter) -> str:
    return ", ".join(f"{n} {op}" for op, n in sorted(counts.items())) or "no wush ops"


class GraphLog:
    """What `trace_graphs` recorded: one `GraphTrace` for each graph, in the order of compilation."""

    def __init__(self):
        self.graphs: list[GraphTrace] = []

    def print(self, after: str | None = None, layer: int | None = None) -> None:
        """Writes every graph to the terminal."""
        if not self.graphs:
            rich.print("nothing was compiled: call the compiled model for the first time inside `with trace_graphs()`")
        for i, graph in enumerate(self.graphs):
            text = f"graph {i}\n{graph.text(after, layer)}\n"
            rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)

    def save(self, directory: str | Path) -> None:
        """Writes each graph after each step (`graph0/02_cse.txt`), and Inductor's kernels (`graph0/kernels.txt`)."""
        for i, graph in enumerate(self.graphs):
            folder = Path(directory) / f"graph{i}"
            folder.mkdir(parents=True, exist_ok=True)
            for j, snapshot in enumerate(graph.snapshots):
                head = f"# {_counts(snapshot.counts)}\n"
                (folder / f"{j:02d}_{snapshot.step}.txt").write_text(head + snapshot.text() + "\n", encoding="utf-8")
            (folder / "kernels.txt").write_text("\n".join(graph.kernels) + "\n", encoding="utf-8")


class Recorder:
    """Writes one graph's steps to all open logs; does nothing when none is open."""

    def __init__(self):
        self.logs, self.traces = list(_LOGS), [GraphTrace() for _ in _LOGS]

    def __bool__(self) -> bool:
        return bool(self.traces)

    def snapshot(self, step: str, graph: Graph, names: list[str] | None = None) -> None:
        if self.traces:
            copy = Graph()
            copy.output(copy.graph_copy(graph, {}))
            shot = Snapshot(step, copy, names, count_ops(graph))
            for log, trace in zip(self.logs, self.traces):
                trace.snapshots.append(shot)
                if step == "incoming":  # before this step Dynamo may still start over
                    log.graphs.append(trace)

    def scheduled(self, nodes: list) -> list:
        """Inductor's hook behind fusion: records a line for each kernel, with the ops that it computes."""
        lines = [f"{i:<4}{line}" for i, line in enumerate(filter(None, map(_kernel, nodes)))]
        for trace in self.traces:
            trace.kernels = lines
        return nodes


def _op_names(node) -> list[str]:
    """The ops that a buffer of Inductor comes from."""
    origins = (o for o in getattr(node, "origins", None) or () if isinstance(o.target, torch._ops.OpOverload))
    return sorted({f"{o.target.namespace}.{o.target._opname}" for o in origins})


def _kernel(scheduled) -> str | None:
    """`fused   aten.add, aten.mul` or `extern  wush.fp4_linear` for a scheduler's node; None if it runs nothing."""
    kind = type(scheduled).__name__
    node = scheduled.node
    if kind.startswith("Nop") or type(node).__name__ == "MultiOutput":
        return None
    if kind.startswith("Extern"):
        op = getattr(node, "op_overload", None)
        name = f"{op.namespace}.{op._opname}" if isinstance(op, torch._ops.OpOverload) else node.python_kernel_name
        return f"extern  {name}"
    names = sorted({name for part in scheduled.get_nodes() for name in _op_names(part.node)})
    return f"fused   {', '.join(names)}"


@contextlib.contextmanager
def recording() -> Iterator[GraphLog]:
    """Records every graph that runs through the passes inside the block."""
    log = GraphLog()
    _LOGS.append(log)
    try:
        yield log
    finally:
        _LOGS.remove(log)


@contextlib.contextmanager
def trace_graphs() -> Iterator[GraphLog]:
    """Records every graph that the wush backend compiles, or `wush_compile.fuse` fuses, inside the block.

    Compile caches are off inside the block: no pass runs on a graph that comes from a cache.
    """
    from torch._inductor import config

    with config.patch(force_disable_caches=True), recording() as log:
        yield log
