"""Removes what the other passes leave: dead nodes, views and paddings that change nothing, assertions of dtypes."""

from torch.fx import Graph

from ..pattern import eliminate_dead_code, is_wush, op_name, replace, same_layout
from .drop_identities import drop_identities

_VIEWS = ("view", "reshape", "_unsafe_view", "expand", "slice", "alias")
_COPIES = ("constant_pad_nd", "contiguous", "clone")  # the copy matters if it is returned or written to


def _ours(node: object) -> bool:
    """Whether a node is a wush call, or a part of its result."""
    while op_name(node) in ("getitem", "split_with_sizes"):
        node = node.args[0]
    return is_wush(node)


def cleanup(graph: Graph) -> int:
    """Drops no-op views around wush ops, dtype assertions and dead code. Leaves a graph without wush ops as it is."""
    if not any(is_wush(node) for node in graph.nodes):
        return 0
    before, changed = len(graph.nodes), True
    while changed:  # removing a view may uncover another
        changed = False
        for node in list(graph.nodes):
            if op_name(node) in _VIEWS + _COPIES and same_layout(node, node.args[0]):
                read_by_us = all(is_wush(user) for user in node.users)
                if read_by_us or op_name(node) in _VIEWS and _ours(node.args[0]):
                    replace(node, node.args[0])
                    changed = True
    for node in list(graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":
            graph.erase_node(node)
    drop_identities(graph)  # copies that only changed the layout, before a fused residual did
    eliminate_dead_code(graph)
    return before - len(graph.nodes)
