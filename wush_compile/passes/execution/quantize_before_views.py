"""Quantizes a norm before it is reshaped into rows, as mixtures of experts do, so that the norm can be fused.

    transform_quantize(view(norm, [-1, K]), ..)  ->  view(transform_quantize(norm, ..), [-1, ..])

A view that keeps the last dimension keeps the rows, and a quantizer takes rows in any number of dimensions.
"""

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..pattern import arguments, eliminate_dead_code, insert, insert_op, is_wush, op_name, replace, value
from .fuse_norm import is_norm

_VIEWS = ("view", "reshape", "_unsafe_view")


def _viewed(node: Node) -> Node | None:
    """What a node is a view of, with the same last dimension and dense; None for anything else."""
    if op_name(node) not in _VIEWS:
        return None
    source = node.args[0]
    before, after = value(source), value(node)
    same = statically_known_true(before.shape[-1] == after.shape[-1])
    return source if same and before.is_contiguous() and before.dim() != after.dim() else None


def quantize_before_views(graph: Graph) -> int:
    """Moves quantizers of reshaped norms in front of the view; the number moved."""
    moved = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize"):
            continue
        quantizer = arguments(node)
        view = quantizer["x"]
        source = _viewed(view)
        if source is None or quantizer["scale_layout"] != "rows" or not is_norm(source):
            continue
        lead = view.args[1][:-1]
        parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        new = insert_op(graph, node, "transform_quantize", quantizer | {"x": source})
        for index, part in parts.items():
            own = insert(graph, node, operator.getitem, (new, index), val=value(new)[index])
            size = [*lead, value(part).shape[-1]]
            replace(part, insert(graph, node, torch.ops.aten.view.default, (own, size), val=value(part)))
        moved += 1
    if moved:
        eliminate_dead_code(graph)
    return moved
