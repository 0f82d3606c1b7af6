"""Fuses the add behind a matmul: the other summand becomes an argument of the matmul.

    add(fp4_linear(.., residual=None), r)  ->  fp4_linear(.., residual=r)   r of the same shape and dtype
    add(fp4_linear(.., bias=None), b)      ->  fp4_linear(.., bias=b)       b [N], everything in fp32

The op rounds before it adds a residual, as the graph does. But it adds a bias before it rounds, so a bias is fused only
where nothing is rounded. A residual in another layout is copied first, unless the graph has such a copy. That costs as
much as the add, but the sum is then dense, and so are the residuals of the layers behind it.
"""

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..pattern import arguments, insert, insert_op, is_wush, only_user, op_name, refresh, replace, same_layout, value


def _alike(linear: Node, other: Node) -> bool:
    """Whether two tensors differ in their strides alone, and `other` repeats no element."""
    y, r = value(linear), value(other)
    return (
        (y.dtype, y.device, y.dim()) == (r.dtype, r.device, r.dim())
        and all(statically_known_true(i == j) for i, j in zip(y.shape, r.shape))
        and all(statically_known_true(stride > 0) for stride in r.stride())
    )


def _dense(linear: Node, other: Node, add: Node) -> Node:
    """`other` in the layout of `linear`: itself, a copy that the graph has before `add`, or a new one."""
    y, r = value(linear), value(other)
    dimensions = zip(y.shape, y.stride(), r.stride())
    if all(statically_known_true(size == 1) or statically_known_true(i == j) for size, i, j in dimensions):
        return other
    for user in other.users:
        if op_name(user) == "clone" and same_layout(user, linear) and user < add:
            return user
    copy = insert(add.graph, add, torch.ops.aten.clone.default, (other,), val=y)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    return copy


def _as_argument(linear: Node, other: object, add: Node) -> dict | None:
    """The argument of `fp4_linear` that `other` can become, {name: node}; None if it can become none."""
    if not is_wush(linear, "fp4_linear") or not isinstance(other, Node) or not only_user(linear, add):
        return None
    y, r, named = value(linear), value(other), arguments(linear)
    if not isinstance(r, torch.Tensor) or named["residual"] is not None or other is linear:
        return None
    if _alike(linear, other):
        return {"residual": other}
    plain = y.dtype == r.dtype == torch.float32 and y.device == r.device and named["bias"] is None
    return {"bias": other} if plain and r.dim() == 1 and statically_known_true(r.shape[0] == y.shape[-1]) else None


def fuse_epilogue(graph: Graph) -> int:
    """Fuses adds into the matmuls before them; the number of adds removed."""
    fused, changed = 0, set()
    for node in list(graph.nodes):
        if op_name(node) != "add" or len(node.args) != 2 or node.kwargs:
            continue
        for linear, other in (node.args, node.args[::-1]):
            found = _as_argument(linear, other, node)
            if found is not None:
                if "residual" in found:
                    found = {"residual": _dense(linear, other, node)}
                new = insert_op(graph, node, "fp4_linear", arguments(linear) | found, val=value(linear))
                if not same_layout(new, node):
                    changed.add(new)
                replace(node, new)
                fused += 1
                break
    if changed:
        refresh(graph, changed)
    return fused
