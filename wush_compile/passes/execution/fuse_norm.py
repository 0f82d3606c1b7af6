"""Fuses RMSNorm and LayerNorm into the quantizer that they feed.

    transform_quantize(rms_norm(x, w), T, ..)  ->  rms_norm_transform_quantize(x, w, eps, .., T, ..)

A norm that something else reads too (a residual behind the norm, a router) becomes an op that writes both:

    y = rms_norm(x, w); transform_quantize(y, T, ..)  ->  codes, scales, y = rms_norm_keep_transform_quantize(x, w, ..)

A norm of a sum that is not rounded first, as vLLM's models have it, takes the sum in too:

    s = x.float() + r.float(); transform_quantize(rms_norm(s, w), T, ..); s.bfloat16()
        ->  codes, scales, rounded s = add_rms_norm_transform_quantize(x, r, w, eps, .., T, ..)

The norm is decomposed (Inductor, or a model that spells it out), one ATen op (export) or one op of vLLM's IR. The fused
op rounds to the model dtype where the graph does. A graph that rounds elsewhere is not fused.
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
    is_cast,
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
_SUM = Op("add", Cast(Var("x")), Cast(Var("residual")))
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


# Its arguments are (x, weight, eps, variance_size), or (x, residual, weight, eps, variance_size) and two results.
VLLM_IR = {"rms_norm": "rms_norm", "fused_add_rms_norm": "add_rms_norm"}


def _fits(root: Node, found: dict, dtype: torch.dtype) -> bool:
    """Whether a norm is over the last dimension, has parameters of its width, works in fp32 and rounds to `dtype`."""
    out = value(root)
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


def _summands(total: Node, dtype: torch.dtype) -> dict | None:
    """The arguments of `add_rms_norm` that come from its sum, if a node is the fp32 sum of two tensors of `dtype`."""
    found = match(_SUM, total)
    if found is None or value(total).dtype != torch.float32:
        return None
    summands = value(found["x"]), value(found["residual"])
    alike = all(s.dtype == dtype and s.shape == value(total).shape for s in summands)
    rounded = [user for user in total.users if is_cast(user) and value(user).dtype == dtype]
    return {**found, "total": total, "rounded": rounded} if alike else None


def _rms_norm(root: Node) -> tuple[str, dict] | None:
    dtype = value(root).dtype if isinstance(value(root), torch.Tensor) else None
    for gain, pattern in RMS_NORM.items():
        found = match(pattern, root)
        if found is None:
            continue
        if gain == "rounded" and not value(found["rounded"]).dtype == value(found["weight"]).dtype == dtype:
            continue
        if _fits(root, found, value(found["x"]).dtype):
            return "rms_norm", _arguments(found, gain=gain)
        if (summed := _summands(found["x"], dtype)) is not None and _fits(root, found, dtype):
            return "add_rms_norm", _arguments(found, gain=gain) | summed
    return None


def _vllm_norm(root: Node) -> tuple[str, dict] | None:
    """As `_rms_norm`, of an op of vLLM's IR."""
    call = root.args[0] if root.target is operator.getitem and root.args[1] == 0 else root
    target = call.target if isinstance(call, Node) else None
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "vllm_ir":
        return None
    op = VLLM_IR.get(target._opname)
    if op is None or target._schema.is_mutable or (call is root) != (op == "rms_norm"):
        return None
    *summands, weight, eps, over = (*call.args, None)[: 4 if op == "rms_norm" else 5]
    tensors = [value(node) for node in (*summands, weight) if node is not None]
    if call.kwargs or over is not None or len({t.dtype for t in tensors}) > 1:
        return None
    gain = "none" if weight is None else "rounded"
    arguments = _arguments({"x": summands[0], "weight": weight, "eps": eps}, gain=gain)
    if op == "add_rms_norm":
        rounded = [part for part in call.users if part.args[1] == 1]
        arguments |= {"residual": summands[1], "total": call, "rounded": rounded}
    return op, arguments


def _layer_norm(root: Node) -> tuple[str, dict] | None:
    found = match(LAYER_NORM, root)
    if found is None or not _fits(root, found, value(found["x"]).dtype):
        return None
    if any(value(found[name]).dtype != value(root).dtype for name in ("weight", "bias") if name in found):
        return None
    return "layer_norm", _arguments(found)


def is_norm(node: Node) -> bool:
    """Whether a node is a norm that can be fused."""
    return (_rms_norm(node) or _layer_norm(node)) is not None


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


def _add(graph: Graph, node: Node, named: dict) -> bool:
    """Replaces a sum, its norm and the quantizer `node` by the op that also writes the rounded sum; whether it did."""
    total, rounded = named["total"], named["rounded"]
    x = value(named["x"])
    dense = torch.empty_like(x, memory_format=torch.contiguous_format)
    same = all(statically_known_true(i == j) for part in rounded for i, j in zip(dense.stride(), value(part).stride()))
    arguments = {name: a for name, a in named.items() if name not in ("total", "rounded")}
    if not same or not all(a < total for a in arguments.values() if isinstance(a, Node)):
        return False
    new = insert_op(graph, total, "add_rms_norm_transform_quantize", arguments, val=(*value(node), dense))
    kept = insert(graph, total, operator.getitem, (new, 2), val=dense)
    for part in rounded:
        replace(part, kept)
    replace(node, new)
    return True


def fuse_norm(graph: Graph) -> int:
    """Fuses each quantizer with the norm before it; the number fused."""
    fused = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize"):
            continue
        quantizer = arguments(node)
        x = quantizer["x"]
        found = _rms_norm(x) or _layer_norm(x) or _vllm_norm(x)
        if found is None:
            continue
        op, norm = found
        if op == "add_rms_norm":
            if not only_user(x, node) or not _add(graph, node, quantizer | norm):
                continue
        elif only_user(x, node):
            replace(node, insert_op(graph, node, f"{op}_transform_quantize", quantizer | norm, val=value(node)))
        elif not _keep(graph, x, node, op, quantizer | norm):
            continue
        fused += 1
    return fused
