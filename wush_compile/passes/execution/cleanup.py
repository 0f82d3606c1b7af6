"""What the other passes leave behind: dead nodes, views and paddings that change nothing, assertions about them."""

from torch.fx import Graph

from ..pattern import is_wush, op_name, replace, same_layout

_VIEWS = ("view", "reshape", "_unsafe_view", "expand", "slice", "alias")
_COPIES = ("constant_pad_nd", "contiguous", "clone")  # a copy may be needed by whoever returns or changes it


def _ours(node: object) -> bool:
    """A wush call, or a part of what one returned."""
    while op_name(node) in ("getitem", "split_with_sizes"):
        node = node.args[0]
    return is_wush(node)


def cleanup(graph: Graph) -> int:
    """Drops no-op views around wush ops, dtype assertions, and dead code; does nothing to a graph without wush ops."""
    if not any(is_wush(node) for node in graph.nodes):
        return 0
    before, changed = len(graph.nodes), True
    while changed:  # what a removed view read may now be one of ours
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
    graph.eliminate_dead_code()
    return before - len(graph.nodes)
