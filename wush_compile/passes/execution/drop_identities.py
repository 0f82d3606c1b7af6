"""Removes what dropout leaves in eval mode: calls that return their input, and copies that stand for it.

    dropout(x, p, train=False)  ->  x                                                            (export)
    clone(x)                    ->  x      of the same layout, x is new, the copy is not returned (Inductor)

They would stand between a product and its residual, or between a norm and its quantizer.
"""

import torch
from torch.fx import Graph, Node

from ..pattern import is_wush, op_name, same_layout


def _schema(node: Node) -> torch._C.FunctionSchema | None:
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def _is_view(node: Node) -> bool:
    """Whether a node may share memory with one of its inputs."""
    schema = _schema(node)
    return schema is None or any(result.alias_info is not None for result in schema.returns)


def _returned(node: Node) -> bool:
    """Whether a node, or a view of it, is a result of the graph."""
    return any(user.op == "output" or _is_view(user) and _returned(user) for user in node.users)


def _writes_in_place(graph: Graph) -> bool:
    """Whether an op writes to anything but an input of the graph; inputs are written at the end."""
    written = (n for n in graph.nodes if (schema := _schema(n)) is not None and schema.is_mutable)
    return any(op_name(n) != "copy_" or n.args[0].op != "placeholder" for n in written)


def _is_copy(node: Node) -> bool:
    """Whether a node is a copy of a new tensor, and stays inside the graph."""
    if op_name(node) != "clone" or not same_layout(node, node.args[0]):
        return False
    source = node.args[0]
    return source.op == "call_function" and not _is_view(source) and not _returned(node)


def drop_identities(graph: Graph) -> int:
    """Replaces identities by their inputs; the number replaced. Leaves a graph without wush ops as it is."""
    if not any(is_wush(node) for node in graph.nodes):
        return 0
    dropped, in_place = 0, _writes_in_place(graph)
    for node in list(graph.nodes):
        dropout = op_name(node) == "dropout" and node.args[2] is False
        if dropout or not in_place and _is_copy(node):
            node.replace_all_uses_with(node.args[0], propagate_meta=False)
            graph.erase_node(node)
            dropped += 1
    return dropped
