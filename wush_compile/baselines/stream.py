"""Finds in a graph what equivalent rewrites of a model change: its norms with the linears behind, its residual stream.

The residual stream is the tensor that embeddings begin, that blocks add to, and that norms read. A rotation of it is
free: it goes into the weights that write to the stream and those that read from it (QuaRot, SpinQuant).
"""

from dataclasses import dataclass

import torch
from torch import fx, nn

from ..calibration.inputs import moved
from ..capture.export import capture, largest_batch
from ..data import Batch
from ..errors import CaptureError
from ..passes.calibration.skipped import called_by

aten = torch.ops.aten
# Ops that change neither the channels of a tensor nor their values.
SAME = {
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
}
CHECKS = {aten._assert_tensor_metadata.default, aten.sym_size.int}


@dataclass(frozen=True)
class Norm:
    """A norm whose result only linears read.

    kind     rms or layer
    weight   the name of its weight; None without one
    bias     the name of its bias, of a LayerNorm; None without one
    offset   what is added to the weight: 1 in Gemma's norms, else 0
    source   the node that it normalizes
    readers  the modules of the linears
    """

    kind: str
    weight: str | None
    bias: str | None
    offset: float
    source: fx.Node
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Stream:
    """The modules that a residual stream touches: embeddings, linears that add to it, linears that read it as it is."""

    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[Norm, ...]


def traced(model: nn.Module, batches: list[Batch]) -> fx.Graph:
    """The graph of a model on the largest of some batches, which may be on another device."""
    return capture(model, moved([largest_batch(batches)], next(model.parameters()).device)).graph_module.graph


def _target(node: object) -> object:
    return node.target if isinstance(node, fx.Node) and node.op == "call_function" else None


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in CHECKS]


def _module(node: fx.Node) -> str:
    return called_by(node)[0]


def _back(node: object) -> object:
    """The node behind casts and copies."""
    while _target(node) in SAME:
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> tuple[str, ...] | None:
    """The linears that read a tensor, also through casts and slices of positions; None if anything else does."""
    found = []
    for user in _users(node):
        if _target(user) is aten.linear.default and user.args[0] is node:
            found.append(_module(user))
        elif _target(user) in SAME or (_target(user) is aten.slice.Tensor and user.args[1] in (0, 1)):
            more = _readers(user)
            if more is None:
                return None
            found += more
        else:
            return None
    return tuple(found)


def _weight(node: object) -> tuple[str, float] | None:
    """(name, offset) of a norm's factor: a parameter, or 1 + a parameter."""
    node, offset = _back(node), 0.0
    if _target(node) is aten.add.Tensor:
        constant = [a for a in node.args if isinstance(a, int | float)]
        rest = [a for a in node.args if isinstance(a, fx.Node)]
        if len(constant) == 1 and len(rest) == 1:
            node, offset = _back(rest[0]), float(constant[0])
    return (node.target, offset) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _normalized(node: fx.Node) -> fx.Node | None:
    """x, if the node is x · rsqrt(mean(x²) + ε), else None."""
    if _target(node) is not aten.mul.Tensor:
        return None
    for x, factor in (node.args, node.args[::-1]):
        factor = _back(factor)
        if _target(factor) is aten.rsqrt.default and _target(factor.args[0]) is aten.add.Tensor:
            mean = _back(factor.args[0].args[0])
            if _target(mean) is aten.mean.dim and _target(_back(mean.args[0])) is aten.pow.Tensor_Scalar:
                return _back(x)
    return None


def find_norms(graph: fx.Graph) -> list[Norm]:
    """The norms of a graph, in its order, whose results only linears read."""
    found = []
    for node in graph.nodes:
        if _target(node) in (aten.layer_norm.default, aten.rms_norm.default):
            names = [a.target if isinstance(a, fx.Node) and a.op == "get_attr" else None for a in node.args[2:4]]
            weight, bias = (*names, None, None)[:2]
            kind = "layer" if node.target is aten.layer_norm.default else "rms"
            if readers := _readers(node):
                found.append(Norm(kind, weight, bias if kind == "layer" else None, 0.0, _back(node.args[0]), readers))
            continue
        source = _normalized(node)
        if source is None:
            continue
        if readers := _readers(node):
            found.append(Norm("rms", None, None, 0.0, source, readers))
            continue
        after = node
        while len(_users(after)) == 1 and _target(_users(after)[0]) in SAME:
            after = _users(after)[0]
        if len(_users(after)) == 1 and _target(scaled := _users(after)[0]) is aten.mul.Tensor:
            weight = _weight(scaled.args[1] if scaled.args[0] is after else scaled.args[0])
            if weight is not None and (readers := _readers(scaled)):
                found.append(Norm("rms", weight[0], None, weight[1], source, readers))
    return found


def find_stream(graph: fx.Graph) -> Stream:
    """The residual stream that begins at the embeddings.

    Raises `CaptureError` if something but a sum, a linear or an RMSNorm in front of linears reads it.
    """
    norms = {}
    for norm in find_norms(graph):
        norms.setdefault(norm.source, []).append(norm)
    left = [n for n in graph.nodes if _target(n) is aten.embedding.default]
    seen, embeddings, writers, readers, used = set(left), [_module(n) for n in left], [], [], []
    if not left:
        raise CaptureError("the model has no embedding of tokens, at which a residual stream begins")

    def carry(node: fx.Node) -> None:
        if node not in seen:
            seen.add(node)
            left.append(node)

    while left:
        node = left.pop()
        own = norms.get(_back(node), []) if node is _back(node) else []
        used += [n for n in own if n not in used]
        for user in _users(node):
            kind = _target(user)
            if kind in SAME or (kind is aten.slice.Tensor and user.args[1] in (0, 1)) or _scales(user, node):
                carry(user)
            elif kind is aten.add.Tensor and len(user.args) == 2:
                other = user.args[1] if user.args[0] is node else user.args[0]
                _written(other, seen, writers, user)
                carry(user)
            elif kind is aten.linear.default and user.args[0] is node:
                readers.append(_module(user))
            elif not _of_norm(user, norms.get(_back(node), [])):
                raise CaptureError(
                    f"{_module(user) or 'the model'}: {user.name} reads the residual stream, and a rotation of it is "
                    "only free where sums, linears and RMSNorms do"
                )
    if any(n.kind != "rms" for n in used):
        raise CaptureError("the model has LayerNorms, which a rotation of the residual stream does not commute with")
    return Stream(*map(tuple, (embeddings, dict.fromkeys(writers), readers, used)))


def _scales(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is x times a number."""
    if _target(node) is not aten.mul.Tensor:
        return False
    other = _back(node.args[1] if node.args[0] is x else node.args[0])
    value = other.meta.get("val") if isinstance(other, fx.Node) else None
    return isinstance(other, int | float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


def _written(node: object, seen: set, writers: list[str], where: fx.Node) -> None:
    """Notes the linear that a summand comes from, unless it is the stream itself."""
    while _target(node) in SAME and node not in seen:
        node = node.args[0]
    if node in seen:
        return
    if _target(node) is not aten.linear.default:
        raise CaptureError(
            f"{where.name} adds {node} to the residual stream, which is the output of no linear: it cannot be rotated"
        )
    writers.append(_module(node))


def _of_norm(node: fx.Node, norms: list[Norm]) -> bool:
    """Whether a node belongs to the arithmetic of a norm of this tensor."""
    return bool(norms) and (
        _target(node) in (aten.pow.Tensor_Scalar, aten.rms_norm.default, aten.layer_norm.default)
        or _normalized(node) is not None
    )
