"""Reading graphs: a printer whose text does not change from run to run, and a log of what each pass did.

    with wush_compile.trace_graphs() as log:
        torch.compile(model, backend="wush")(ids)
    log.print()
"""

import contextlib
import operator
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType

import rich
import torch
from torch.fx import Graph, Node

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "bool",
}
_LOGS: list["GraphLog"] = []


# -- printer ---------------------------------------------------------------------------------------------------------

def readable_name(placeholder: str) -> str:
    """Dynamo's mangled name of an input -> the path of the parameter, as far as it can be told."""
    name = re.sub(r"^(p|b|c)_|^l_(self_|args_|kwargs_)?|_$", "", placeholder, flags=re.IGNORECASE)
    name = re.sub(r"^modules_|_(modules|parameters|buffers)_", lambda m: "." if m[1] else "", name)
    return re.sub(r"_group_0\b", ".group", name)


def layer_of(node: Node) -> int | None:
    """The first number in the path of the module a node came from: its decoder layer."""
    for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if number := re.search(r"\.(\d+)(?=\.|$)", path):
            return int(number[1])
    return None


def _callable_name(target) -> str:
    return getattr(target, "__name__", str(target))          # a function's `str` holds its address


def _node_name(target) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    name = _callable_name(target)
    return f"size_{name}" if isinstance(target, BuiltinFunctionType) else name       # Python's mul is not that of tensors


class _Printer:
    """Names nodes by their op, symbols by their order of appearance; within a layer, tensors by their path in it."""

    def __init__(self, graph: Graph, names: list[str] | None, layer: int | None):
        self.names: dict[Node, str] = {}
        self.symbols: dict[str, str] = {}
        counts: Counter = Counter()
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        given = names if names is not None and len(names) == len(inputs) else [readable_name(n.target) for n in inputs]
        for node, name in zip(inputs, given):
            symbolic = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat)
            if layer is not None:
                name = re.sub(rf"^(.*?\.)?{layer}\.", "", name)
            self.names[node] = self._value(node.meta["val"]) if symbolic else name
        for node in graph.nodes:
            if node in self.names or node.op == "output":
                continue
            if node.target is operator.getitem:
                self.names[node] = f"{self._argument(node.args[0])}[{node.args[1]}]"
                continue
            base = _node_name(node.target)
            base = base.rpartition(".")[2] if node.op != "call_function" else re.sub(r"\W+", "_", base)
            number, counts[base] = counts[base], counts[base] + 1
            self.names[node] = f"{base}_{number}" if number else base

    def _size(self, size) -> str:
        if isinstance(size, int):
            return str(size)
        def rename(symbol: re.Match) -> str:
            return self.symbols.setdefault(symbol[0], f"{symbol[1]}{len(self.symbols)}")
        return re.sub(r"\b([a-z]+)\d+\b", rename, str(size))

    def _value(self, value) -> str:
        if isinstance(value, torch.Tensor):
            shape = ", ".join(self._size(s) for s in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{shape}]"
        if isinstance(value, list | tuple):
            return f"({', '.join(self._value(v) for v in value)})"
        return self._size(value)

    def _argument(self, argument) -> str:
        if isinstance(argument, Node):
            return self.names[argument]
        if isinstance(argument, list | tuple):
            body = ", ".join(self._argument(a) for a in argument)
            return f"[{body}]" if isinstance(argument, list) else f"({body})"
        if isinstance(argument, torch.dtype):
            return _DTYPES.get(argument, str(argument).removeprefix("torch."))
        if isinstance(argument, torch.SymInt | torch.SymFloat):
            return self._size(argument)
        return repr(argument)

    def _launch(self, node: Node) -> str:
        """A packaged launch: `kernel[grid](argument=.., ..)`, without the numbers under which this process keeps it."""
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        kernel, (grid,) = kernel_side_table.get_kernel(node.kwargs["kernel_idx"]), node.kwargs["grid"]
        sizes = ", ".join(self._size(g.meta["val"] if isinstance(g, Node) else g) for g in grid)
        arguments = ", ".join(f"{name}={self._argument(a)}" for name, a in sorted(node.kwargs["kwargs"].items()))
        return f"triton.{getattr(kernel, 'fn', kernel).__name__}[{sizes}]({arguments})"

    def line(self, node: Node) -> str:
        if node.op == "output":
            return f"return {self._argument(node.args[0])}"
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = f"{target.namespace}.{target._opname}"
        elif callable(target):
            target = _callable_name(target)
        arguments = [self._argument(a) for a in node.args]
        arguments += [f"{k}={self._argument(v)}" for k, v in node.kwargs.items()]
        if node.op == "get_attr":
            return f"{self.names[node]} = self.{node.target}"
        if str(target).startswith("triton_kernel_wrapper"):
            return f"{self.names[node]} = {self._launch(node)}"
        return f"{self.names[node]} = {target}({', '.join(arguments)})  # {self._value(node.meta.get('val'))}"


def print_graph(graph: Graph, names: list[str] | None = None, layer: int | None = None) -> str:
    """A graph as text, one call a line with dtype and shape; the same graph gives the same text in every process.

    names: of the placeholders, in order. layer: only the nodes of this decoder layer, with names relative to it.
    """
    printer = _Printer(graph, names, layer)
    shown = (n for n in graph.nodes if n.op != "placeholder" and n.target is not operator.getitem)
    return "\n".join(printer.line(n) for n in shown if layer is None or n.op != "output" and layer_of(n) == layer)


def count_ops(graph: Graph) -> Counter:
    """Name of each wush op in a graph -> how often it is called."""
    targets = (n.target for n in graph.nodes if n.op == "call_function")
    return Counter(t._opname for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace == "wush")


# -- log -------------------------------------------------------------------------------------------------------------

@dataclass
class Snapshot:
    """A graph as it stood after one step."""

    step: str
    graph: Graph
    names: list[str] | None
    counts: Counter

    def text(self, layer: int | None = None) -> str:
        return print_graph(self.graph, self.names, layer)


@dataclass
class GraphTrace:
    """One graph on its way through the backend: `dynamo`, `incoming`, then one snapshot a pass; Inductor's kernels."""

    snapshots: list[Snapshot] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)

    def __getitem__(self, step: str) -> Snapshot:
        for snapshot in self.snapshots:
            if snapshot.step == step:
                return snapshot
        raise KeyError(f"no step {step!r}: the steps are {', '.join(s.step for s in self.snapshots)}")

    def text(self, after: str | None = None, layer: int | None = None) -> str:
        """The graph after one step; without `after`, the incoming graph, the last, and what happened between."""
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
    """What `trace_graphs` recorded: one `GraphTrace` a graph, in the order they were compiled."""

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
        """One file a graph and step: `graph0/02_cse.txt`; `graph0/kernels.txt` is what Inductor made of it."""
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
                if step == "incoming":                       # earlier, Dynamo may still start over
                    log.graphs.append(trace)

    def scheduled(self, nodes: list) -> list:
        """Inductor's hook behind fusion: a line for each kernel, with the ops it came from."""
        lines = [f"{i:<4}{line}" for i, line in enumerate(filter(None, map(_kernel, nodes)))]
        for trace in self.traces:
            trace.kernels = lines
        return nodes


def _op_names(node) -> list[str]:
    """The ops a buffer of Inductor's came from."""
    origins = (o for o in getattr(node, "origins", None) or () if isinstance(o.target, torch._ops.OpOverload))
    return sorted({f"{o.target.namespace}.{o.target._opname}" for o in origins})


def _kernel(scheduled) -> str | None:
    """`fused   aten.add, aten.mul` or `extern  wush.fp4_linear`, of a scheduler's node; None if it runs nothing."""
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
def trace_graphs() -> Iterator[GraphLog]:
    """Records every graph that is compiled by the wush backend, or fused by `wush_compile.fuse`, inside the block.

    Compile caches are off inside: a graph served from a cache passes no pass, so there would be nothing to see.
    """
    from torch._inductor import config

    log = GraphLog()
    _LOGS.append(log)
    try:
        with config.patch(force_disable_caches=True):
            yield log
    finally:
        _LOGS.remove(log)
