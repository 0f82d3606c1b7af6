"""Prints FX graphs: the same graph gives the same text in every process."""

import operator
import re
from collections import Counter
from types import BuiltinFunctionType

import torch
from torch.fx import Graph, Node

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def readable_name(placeholder: str) -> str:
    """Dynamo's mangled name of an input -> the path of the parameter, where the name still shows it."""
    name = re.sub(r"^(p|b|c)_|^l_(self_|args_|kwargs_)?|_$", "", placeholder, flags=re.IGNORECASE)
    name = re.sub(r"^modules_|_(modules|parameters|buffers)_", lambda m: "." if m[1] else "", name)
    return re.sub(r"_group_0\b", ".group", name)


def layer_of(node: Node) -> int | None:
    """The decoder layer of a node: the first number in the path of its module."""
    for path, _ in reversed((node.meta.get("nn_module_stack") or {}).values()):
        if number := re.search(r"\.(\d+)(?=\.|$)", path):
            return int(number[1])
    return None


def _callable_name(target) -> str:
    return getattr(target, "__name__", str(target))  # a function's `str` holds its address


def _node_name(target) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    name = _callable_name(target)
    return f"size_{name}" if isinstance(target, BuiltinFunctionType) else name  # Python's mul works on sizes


class _Printer:
    """Names nodes by op, symbols by order of appearance, and a layer's tensors by their path in the layer.

    No two values have one name.
    """

    def __init__(self, graph: Graph, names: list[str] | None, layer: int | None):
        self.names: dict[Node, str] = {}
        self.symbols: dict[str, str] = {}
        taken: set[str] = set()
        counts: Counter = Counter()

        def unique(base: str) -> str:
            name = base
            while name in taken:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
            taken.add(name)
            return name

        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        given = names if names is not None and len(names) == len(inputs) else [readable_name(n.target) for n in inputs]
        for node, name in zip(inputs, given):
            symbolic = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat)
            if layer is not None:
                name = re.sub(rf"^(.*?\.)?{layer}\.", "", name)
            self.names[node] = self._value(node.meta["val"]) if symbolic else unique(name)
        for node in graph.nodes:
            if node in self.names or node.op == "output":
                continue
            if node.target is operator.getitem:
                self.names[node] = f"{self._argument(node.args[0])}[{node.args[1]}]"
                continue
            base = _node_name(node.target)
            base = base.rpartition(".")[2] if node.op != "call_function" else re.sub(r"\W+", "_", base)
            self.names[node] = unique(base)

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
        """A packaged launch, `kernel[grid](argument=.., ..)`, without the process's own numbers for kernels."""
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
    """A graph as text, one call a line with dtype and shape. The same graph gives the same text in every process.

    names   of the placeholders, in order
    layer   print only the nodes of this decoder layer, with names relative to it
    """
    printer = _Printer(graph, names, layer)
    shown = (n for n in graph.nodes if n.op != "placeholder" and n.target is not operator.getitem)
    return "\n".join(printer.line(n) for n in shown if layer is None or n.op != "output" and layer_of(n) == layer)


def count_ops(graph: Graph) -> Counter:
    """Name of each wush op in a graph -> number of its calls."""
    targets = (n.target for n in graph.nodes if n.op == "call_function")
    return Counter(t._opname for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace == "wush")
