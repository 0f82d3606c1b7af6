"""Replaces every wush op by a graph that runs without Python.

On a GPU an op becomes launches of Triton kernels for its compute capability (`kernels/triton/packaged`). On other
devices, and for calls that those kernels refuse, it becomes the ATen arithmetic that defines it, without constants.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ...kernels import dispatch as kernels
from ...ops import core
from ...ops.fused import FUSED_REFERENCE
from ...ops.grouped import GROUPED_ARITHMETIC
from ..pattern import arguments, eliminate_dead_code, fakes, freeze, is_wush, op_name, replace, value
from .lower import fused_ops
from .paste import replace_by

ARITHMETIC = core.ARITHMETIC | GROUPED_ARITHMETIC
# Ops that build constants in `kernels/triton/packaged`; `_share` merges equal ones.
_SOURCES = ("arange", "mul", "add", "full", "zeros")


def _body(node: Node, weight_of: Callable[[Node], Tensor | None]) -> Callable:
    """The function that replaces an op: Triton launches, or arithmetic."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        triton = next(provider for provider in kernels.PROVIDERS if provider.name == "triton")
        if triton.unavailable(capability) is None:
            from ...kernels.triton import packaged

            processors = torch.cuda.get_device_properties(device).multi_processor_count
            call = arguments(node)
            if packaged.refuses(op, *fakes(tuple(call.values()))) is None:
                tensors = {name: weight_of(a) for name, a in call.items() if isinstance(a, Node)}
                return functools.partial(packaged.PACKAGED[op], packaged.known(capability, processors, call, tensors))
    return ARITHMETIC[op]


def _by_size(node: Node) -> object:
    """A size by its expression: each layer has a node of its own for it."""
    return str(value(node)) if isinstance(value(node), torch.SymInt) else node


def _share(new: list[Node]) -> None:
    """Merges equal constants among new nodes. Split-K counters may be merged: each product leaves them zero."""
    seen: dict[tuple, Node] = {}
    for node in new:
        sizes = [n for n in node.all_input_nodes if isinstance(value(n), torch.SymInt)]
        if op_name(node) in _SOURCES and all(n in sizes or n in seen.values() for n in node.all_input_nodes):
            key = node.target, freeze(node.args, _by_size), freeze(node.kwargs, _by_size)
            first = seen.setdefault(key, node)
            if first is not node:
                replace(node, first)


def package(graph: Graph, weight_of: Callable[[Node], Tensor | None] = lambda node: None) -> int:
    """Replaces every wush op; the number replaced. weight_of: the tensor that a node of the program always is, or None;
    which of the library's products are exact depends on it."""
    fused = fused_ops(graph)
    replace_by(graph, fused, lambda node: FUSED_REFERENCE[node.target._opname])
    nodes = [node for node in graph.nodes if is_wush(node, *ARITHMETIC)]
    _share(replace_by(graph, nodes, functools.partial(_body, weight_of=weight_of)))
    if nodes:
        eliminate_dead_code(graph)
    return len(nodes)
