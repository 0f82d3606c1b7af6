"""Fuses the add behind a matmul: the other summand becomes an argument of the matmul.

    add(fp4_linear(.., residual=None), r)  ->  fp4_linear(.., residual=r)   r of the same shape and dtype
    add(fp4_linear(.., bias=None), b)      ->  fp4_linear(.., bias=b)       b [N], everything in fp32

The op rounds before it adds a residual, as the graph does. But it adds a bias before it rounds, so a bias is fused only
where nothing is rounded.
"""

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..pattern import arguments, insert_op, is_wush, only_user, op_name, replace, same_layout, value


def _as_argument(linear: Node, other: object, add: Node) -> dict | None:
    """The argument of `fp4_linear` that `other` can become, {name: node}; None if it can become none."""
    if not is_wush(linear, "fp4_linear") or not isinstance(other, Node) or not only_user(linear, add):
        return None
    y, r, named = value(linear), value(other), arguments(linear)
    if not isinstance(r, torch.Tensor) or named["residual"] is not None or other is linear:
        return None
    if same_layout(linear, other):
        return {"residual": other}
    plain = y.dtype == r.dtype == torch.float32 and y.device == r.device and named["bias"] is None
    return {"bias": other} if plain and r.dim() == 1 and statically_known_true(r.shape[0] == y.shape[-1]) else None


def fuse_epilogue(graph: Graph) -> int:
    """Fuses adds into the matmuls before them; the number of adds removed."""
    fused = 0
    for node in list(graph.nodes):
        if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
            continue
        for linear, other in (node.args, node.args[::-1]):
            found = _as_argument(linear, other, node)
            if found is not None:
                named = arguments(linear) | found
                replace(node, insert_op(graph, node, "fp4_linear", named, val=value(node)))
                fused += 1
                break
    return fused
