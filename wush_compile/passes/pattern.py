"""Patterns over ATen graphs: `match(pattern, node)` returns the bindings, or None.

A pattern is built of

    Var(name)              any node; the same name twice must be the same node
    Num(name)              a Python number, or a node that holds a scalar tensor
    Op(op, *args)          a call of the ATen or prims op of that name, whatever its overload; mul and add commute
    Cast(p)                p, or one dtype conversion of p (not two in a row: the first may round)
    Either(p, q, ..)       the first that matches
    ANY                    anything
    anything else          a literal that must be equal

`bind=` on Op and Cast names the node itself. Every step returns a new dict, so a failed attempt leaves no bindings.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ops.schema import bind, positional

ANY = object()
CASTS = ("convert_element_type", "to", "_to_copy", "type_as")
COMMUTE = ("mul", "add")


class Var(NamedTuple):
    name: str


class Num(NamedTuple):
    name: str


class Op:
    def __init__(self, op: str, *args, bind: str | None = None):
        self.op, self.args, self.bind = op, args, bind


class Cast(NamedTuple):
    pattern: object
    bind: str | None = None


class Either:
    def __init__(self, *patterns):
        self.patterns = patterns


def op_name(node: object) -> str:
    """Op name of a node: "mul" for aten.mul.Tensor, "getitem" for operator.getitem, "" outside aten and prims."""
    target = getattr(node, "target", None)
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return ""
    return target._opname


def value(node: Node):
    """What tracing recorded of a node: a fake tensor, a tuple of them, or a number."""
    return node.meta.get("val")


def is_cast(node: object) -> bool:
    """Whether a node converts the dtype of a tensor and leaves it on its device."""
    if op_name(node) not in CASTS or not isinstance(value(node), torch.Tensor):
        return False
    source = value(node.args[0])
    return isinstance(source, torch.Tensor) and source.device == value(node).device


def _bind(bound: dict, name: str | None, what: object) -> dict | None:
    if name is None:
        return bound
    if name in bound:
        return bound if bound[name] is what else None
    return {**bound, name: what}


def match(pattern: object, what: object, bound: dict | None = None) -> dict | None:
    """Matches `what` (a node or a literal argument): name -> node or number, or None if it does not match."""
    bound = {} if bound is None else bound
    if pattern is ANY:
        return bound
    if isinstance(pattern, Var):
        return _bind(bound, pattern.name, what) if isinstance(what, Node) else None
    if isinstance(pattern, Num):
        scalar = isinstance(what, Node) and isinstance(value(what), torch.Tensor) and value(what).dim() == 0
        return _bind(bound, pattern.name, what) if scalar or isinstance(what, int | float) else None
    if isinstance(pattern, Either):
        return next((m for p in pattern.patterns if (m := match(p, what, bound)) is not None), None)
    if isinstance(pattern, Cast):
        if is_cast(what) and (found := match(pattern.pattern, what.args[0], bound)) is not None:
            return _bind(found, pattern.bind, what)
        found = match(pattern.pattern, what, bound)
        return None if found is None else _bind(found, pattern.bind, what)
    if isinstance(pattern, Op):
        if op_name(what) != pattern.op:
            return None
        args = tuple(what.args) + tuple(what.kwargs.values())
        if len(args) != len(pattern.args):
            return None
        bound = _bind(bound, pattern.bind, what)
        if bound is None:
            return None
        found = _match_all(pattern.args, args, bound)
        if found is None and pattern.op in COMMUTE:
            found = _match_all(pattern.args, args[::-1], bound)
        return found
    if isinstance(what, Node):
        return None
    return bound if pattern == what and isinstance(pattern, bool) == isinstance(what, bool) else None


def _match_all(patterns: tuple, values: tuple, bound: dict) -> dict | None:
    for pattern, what in zip(patterns, values):
        bound = match(pattern, what, bound)
        if bound is None:
            return None
    return bound


# -- editing ---------------------------------------------------------------------------------------------------------


def is_wush(node: object, *ops: str) -> bool:
    """Whether a node calls one of these `wush::` ops (any, if none is named)."""
    target = getattr(node, "target", None)
    return (
        isinstance(target, torch._ops.OpOverload) and target.namespace == "wush" and (not ops or target._opname in ops)
    )


def arguments(node: Node) -> dict:
    """The arguments of a call of a wush op by name, in the order of its schema, with its defaults filled in."""
    return bind(node.target._opname, node.args, node.kwargs)


def same_layout(a: Node, b: Node) -> bool:
    """Whether two tensors are known to agree in shape, strides, dtype and device."""
    return _same(value(a), value(b))


def _same(x: object, y: object) -> bool:
    if isinstance(x, list | tuple) and isinstance(y, list | tuple):
        return len(x) == len(y) and all(map(_same, x, y))
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)) or x.dim() != y.dim():
        return False
    return (
        x.dtype == y.dtype
        and x.device == y.device
        and all(statically_known_true(i == j) for i, j in zip((*x.shape, *x.stride()), (*y.shape, *y.stride())))
    )


def only_user(node: Node, user: Node) -> bool:
    """Whether `user` alone reads `node`, apart from export's assertions about its dtype."""
    return all(u is user or op_name(u) == "_assert_tensor_metadata" for u in node.users)


def fakes(args: object) -> object:
    """Arguments with each node replaced by what tracing recorded of it."""
    return torch.fx.map_arg(args, value)


def insert(graph: Graph, where: Node, target, args: tuple, val: object = None, kwargs: dict | None = None) -> Node:
    """A new call before `where`, with `where`'s place in the module tree.

    val: what is recorded of the new node, if it is known. Otherwise its fake kernel runs, which takes longer.
    """
    with graph.inserting_before(where):
        node = graph.call_function(target, args, kwargs or {})
    node.meta = {k: where.meta[k] for k in ("stack_trace", "nn_module_stack", "source_fn_stack") if k in where.meta}
    if val is not None:
        node.meta["val"] = val
    else:
        with torch.no_grad():
            node.meta["val"] = target(*fakes(args), **(kwargs or {}))
    return node


def insert_op(graph: Graph, where: Node, op: str, named: dict, val: object = None) -> Node:
    """As `insert`, a call of `wush::op` with arguments by name; names that the op does not have are left out."""
    return insert(graph, where, getattr(torch.ops.wush, op).default, positional(op, named), val)


def freeze(argument: object, tensor: Callable = lambda node: node) -> object:
    """An argument as a dictionary key; `tensor` gives the key of a node.

    Literals keep their type, because 1, 1.0 and True are equal in Python but not to an op.
    """
    if isinstance(argument, Node):
        return tensor(argument)
    if isinstance(argument, dict):
        return tuple((name, freeze(a, tensor)) for name, a in sorted(argument.items()))
    if isinstance(argument, list | tuple):
        return tuple(freeze(a, tensor) for a in argument)
    return type(argument), argument


def layout(node: Node) -> object:
    """What the code of an op depends on in a tensor; nodes with equal layouts are interchangeable.

    A node that is not a tensor is its own layout.
    """
    fake = value(node)
    if not isinstance(fake, torch.Tensor):
        return node
    return str(fake.shape), str(fake.stride()), str(fake.storage_offset()), fake.dtype, fake.device


def refresh(graph: Graph, changed: set[Node]) -> None:
    """Updates `meta["val"]` behind nodes whose strides changed; a view that is no longer possible becomes a reshape.

    What `as_strided` reads, by places in memory, is copied to the dense layout that it had.
    """
    aten, unchanged = torch.ops.aten, set()
    before = {n: value(n).stride() for n in graph.nodes if isinstance(value(n), torch.Tensor)}
    for node in list(graph.nodes):
        if changed.isdisjoint(node.all_input_nodes) or not (op_name(node) or is_wush(node)):
            continue
        if op_name(node) == "as_strided":
            source = node.args[0]
            order = sorted(range(value(source).dim()), key=lambda d: before[source][d], reverse=True)
            dense = insert(graph, node, aten.permute.default, (source, order))
            dense = insert(graph, node, aten.clone.default, (dense,), kwargs={"memory_format": torch.contiguous_format})
            back = insert(graph, node, aten.permute.default, (dense, [order.index(d) for d in range(len(order))]))
            node.replace_input_with(source, back)
            continue
        # A fake kernel is slow, and decoder layers are alike: run it once for each signature.
        signature = node.target, freeze((node.args, node.kwargs), layout), layout(node)
        if signature in unchanged:
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            try:
                fake = node.target(*args, **kwargs)
            except (RuntimeError, ValueError):
                if node.target is not aten.view.default:
                    raise
                node.target = aten.reshape.default
                fake = node.target(*args, **kwargs)
        if _same(fake, value(node)):
            unchanged.add(signature)
        else:
            changed.add(node)
        node.meta["val"] = fake


def has_effect(node: Node) -> bool:
    """Whether a node without users does something: `vmap` enters and leaves a level by calls that return nothing."""
    return node.is_impure() or "functorch" in (getattr(node.target, "__module__", None) or "")


def eliminate_dead_code(graph: Graph) -> None:
    """Erases nodes whose results nobody reads."""
    graph.eliminate_dead_code(is_impure_node=has_effect)


def replace(node: Node, by: Node) -> None:
    """Replaces every use of `node` by `by`, and erases `node` with the nodes that only it read."""
    node.replace_all_uses_with(by, propagate_meta=False)
    dead, erased = [node], set()
    while dead:
        node = dead.pop()  # a node that two erased nodes read is listed twice
        if node not in erased and not node.users and node.op == "call_function" and not has_effect(node):
            dead += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)
