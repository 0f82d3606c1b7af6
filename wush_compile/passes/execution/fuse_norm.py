"""Fuses RMSNorm and LayerNorm into the quantizer that they feed.

    transform_quantize(rms_norm(x, w), T, ..)  ->  rms_norm_transform_quantize(x, w, eps, .., T, ..)

A norm that something else reads too (a residual behind the norm, a router) becomes an op that writes both:

    y = rms_norm(x, w); transform_quantize(y, T, ..)  ->  codes, scales, y = rms_norm_keep_transform_quantize(x, w, ..)

The norm is decomposed (Inductor, or a model that spells it out) or one ATen op (export). The fused op rounds to the
model dtype where the graph does. A graph that rounds elsewhere is not fused.
"""

import operator

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..pattern import (
    ANY,
    Cast,
    Either,
    Num,
    Op,
    Var,
    arguments,
    insert,
    insert_op,
    is_wush,
    match,
    only_user,
    replace,
    value,
)

_X = Cast(Var("x"), bind="wide")
_W = Cast(Var("weight"))
_EPS = Cast(Num("eps"))
_SQUARE = Either(Op("pow", _X, 2), Op("mul", _X, _X), Op("square", _X))
_RMS = Op("mul", _X, Op("rsqrt", Op("add", Op("mean", _SQUARE, ANY, True, bind="reduction"), _EPS)))
# gain -> pattern, tried in this order. In fp32 nothing rounds, some patterns coincide, and the first match is right.
RMS_NORM = {
    "wide_plus_one": Cast(Op("mul", _RMS, Op("add", _W, 1))),
    "rounded": Op("mul", Var("weight"), Cast(_RMS, bind="rounded")),
    "wide": Either(Cast(Op("mul", _RMS, _W)), Op("rms_norm", Var("x"), ANY, Var("weight"), Num("eps"))),
    "none": Cast(_RMS),
}
_STATS = Op("var_mean", _X, ANY, 0, True, bind="reduction")
_CENTERED = Op("sub", _X, Op("getitem", _STATS, 1))
_NORMED = Op("mul", _CENTERED, Op("rsqrt", Op("add", Op("getitem", _STATS, 0), _EPS)))
LAYER_NORM = Either(
    Cast(Op("add", Op("mul", _NORMED, _W), Cast(Var("bias")))),
    Cast(Op("mul", _NORMED, _W)),
    Cast(_NORMED),
    Op("layer_norm", Var("x"), ANY, Var("weight"), Var("bias"), Num("eps"), ANY),
    Op("layer_norm", Var("x"), ANY, Var("weight"), Var("bias"), Num("eps")),
    Op("layer_norm", Var("x"), ANY, Var("weight"), Var("bias")),
)


def _fits(root: Node, found: dict) -> bool:
    """Whether a norm is over the last dimension, has parameters of its width, works in fp32 and rounds to x's dtype."""
    out, dtype = value(root), value(found["x"]).dtype
    wide, reduction = found.get("wide"), found.get("reduction")
    if out.dtype != dtype or wide is not None and value(wide).dtype != torch.float32:
        return False
    if reduction is None:  # a whole norm op: (x, normalized_shape, ..)
        return len(root.args[1]) == 1
    if list(reduction.args[1]) not in ([-1], [out.dim() - 1]):
        return False
    vectors = [value(found[name]) for name in ("weight", "bias") if name in found]
    return all(v.dim() == 1 and v.shape[0] == out.shape[-1] for v in vectors)


def _arguments(found: dict, **others) -> dict:
    """The arguments of a fused op that come from the norm."""
    eps = found.get("eps", 1e-5)
    number, tensor = (0.0, eps) if isinstance(eps, Node) else (float(eps), None)
    vectors = {name: found.get(name) for name in ("weight", "bias")}
    return {"x": found["x"], "eps": number, "eps_tensor": tensor, **vectors, **others}


def _rms_norm(root: Node) -> tuple[str, dict] | None:
    for gain, pattern in RMS_NORM.items():
        found = match(pattern, root)
        if found is None or not _fits(root, found):
            continue
        if gain == "rounded" and not value(found["rounded"]).dtype == value(found["weight"]).dtype == value(root).dtype:
            continue
        return "rms_norm", _arguments(found, gain=gain)
    return None


def _layer_norm(root: Node) -> tuple[str, dict] | None:
    found = match(LAYER_NORM, root)
    if found is None or not _fits(root, found):
        return None
    if any(value(found[name]).dtype != value(root).dtype for name in ("weight", "bias") if name in found):
        return None
    return "layer_norm", _arguments(found)


def _keep(graph: Graph, root: Node, node: Node, op: str, named: dict) -> bool:
    """Replaces a norm and one of its readers, the quantizer `node`, by the op that writes both; whether it did."""
    dense = torch.empty_like(value(root), memory_format=torch.contiguous_format)
    others = [a for a in named.values() if isinstance(a, Node)]
    same = all(statically_known_true(i == j) for i, j in zip(dense.stride(), value(root).stride()))
    if not same or not all(other < root for other in others):
        return False
    new = insert_op(graph, root, f"{op}_keep_transform_quantize", named, val=(*value(node), dense))
    kept = insert(graph, root, operator.getitem, (new, 2), val=dense)
    replace(node, new)
    replace(root, kept)
    return True


def fuse_norm(graph: Graph) -> int:
    """Fuses each quantizer with the norm before it; the number fused."""
    fused = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize"):
            continue
        quantizer = arguments(node)
        x = quantizer["x"]
        found = _rms_norm(x) or _layer_norm(x)
        if found is None:
            continue
        op, norm = found
        if only_user(x, node):
            replace(node, insert_op(graph, node, f"{op}_transform_quantize", quantizer | norm, val=value(node)))
        elif not _keep(graph, x, node, op, quantizer | norm):
            continue
        fused += 1
    return fused
