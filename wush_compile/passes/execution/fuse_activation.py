"""Fuses an activation, gated or not, into the quantizer that it feeds.

    transform_quantize(silu(gate) * up, T, ..)  ->  silu_mul_transform_quantize(gate, up, T, ..)
    transform_quantize(relu(x), T, ..)          ->  activation_transform_quantize(x, "relu", T, ..)
    transform_quantize((up + 1) * (gate * sigmoid(1.702 * gate)), T, ..)
                                                ->  swiglu_oai_transform_quantize(x, 7.0, T, ..)

GELU, exact and tanh, is fused with a gate too. An activation is one ATen op (export) or decomposed (Inductor). Both
compute it in fp32 and round it to the model dtype once. transformers spells `gelu_new` and `quick_gelu` out in single
ops, which all round. So is gpt-oss' gate, whose gate and up are clamped, and alternate in the columns of x.
"""

import sys

import torch
from torch.fx import Graph, Node

from ..pattern import (
    Cast,
    Either,
    Num,
    Op,
    Var,
    arguments,
    insert_op,
    is_wush,
    match,
    only_user,
    op_name,
    replace,
    value,
)

_X = Var("x")
_WIDE = Cast(_X, bind="wide")
_SIGMOID_FORMS = (
    Op("div", _WIDE, Op("add", Op("exp", Op("neg", _WIDE)), 1)),
    Op("mul", _WIDE, Op("sigmoid", _WIDE)),
)
_CUBE = Op("mul", Op("mul", _WIDE, _WIDE), _WIDE)
_TANH = Op("tanh", Op("mul", Op("add", _WIDE, Op("mul", _CUBE, 0.044715)), 0.7978845608028654))
_TANH_NEW = Op("tanh", Op("mul", Op("add", _X, Op("mul", Op("pow", _X, 3), 0.044715)), 0.7978845608028654))
_ERF = Op("erf", Op("mul", _WIDE, 0.7071067811865476))
_HALF = Op("mul", _WIDE, 0.5)
_RELU = Op("relu", _X)

_SILU = Either(Op("silu", _X), *map(Cast, _SIGMOID_FORMS))
_GELU = Either(Op("gelu", _X), Op("gelu", _X, "none"), Cast(Op("mul", _HALF, Op("add", _ERF, 1))))
_GELU_TANH = Either(Op("gelu", _X, "tanh"), Cast(Op("mul", _HALF, Op("add", _TANH, 1))))
# kind -> what the activation looks like
ACTIVATIONS = {
    "relu": _RELU,
    "relu2": Either(Op("pow", _RELU, 2), Op("square", _RELU), Op("mul", Op("relu", _X, bind="r"), Var("r"))),
    "silu": _SILU,
    "gelu": _GELU,
    "gelu_new": Op("mul", Op("mul", _X, 0.5), Op("add", _TANH_NEW, 1)),
    "gelu_tanh": _GELU_TANH,
    "quick_gelu": Op("mul", _X, Op("sigmoid", Op("mul", _X, 1.702))),
}
# (op, how GELU is approximated) -> the activation of its gate
GATED = {
    ("silu_mul_transform_quantize", None): _SILU,
    ("gelu_mul_transform_quantize", "tanh"): _GELU_TANH,
    ("gelu_mul_transform_quantize", "none"): _GELU,
}

# gpt-oss' gate: clamped in one op, or in fp32 (Inductor).
_CLAMPED = Either(
    Op("clamp", Var("gate"), None, Num("limit")),
    Cast(Op("clamp_max", Cast(Var("gate")), Num("limit"))),
)
_CLAMPED_UP = Either(
    Op("clamp", Var("up"), Num("least"), Num("most")),
    Cast(Op("clamp_max", Op("clamp_min", Cast(Var("up")), Num("least")), Num("most"))),
)
_SWIGLU_OAI = Op("mul", Op("add", _CLAMPED_UP, 1), Op("mul", _CLAMPED, Op("sigmoid", Op("mul", _CLAMPED, 1.702))))


def _in_fp32(found: dict) -> bool:
    """Whether a decomposed activation works in fp32."""
    return "wide" not in found or value(found["wide"]).dtype == torch.float32


def _gated(root: Node) -> tuple[str, dict] | None:
    """(the fused op, the arguments of its activation) if `root` is a gated activation."""
    for (op, approximate), activation in GATED.items():
        found = match(Op("mul", activation, Var("up")), root)
        if found is None:
            continue
        activated = next(a for a in root.args if a is not found["up"])
        gate, up = value(found["x"]), value(found["up"])
        if gate.shape != up.shape or not gate.dtype == up.dtype == value(activated).dtype == value(root).dtype:
            continue
        if _in_fp32(found):
            return op, {"gate": found["x"], "up": found["up"], "approximate": approximate}
    return None


def _alternating(gate: Node, up: Node) -> Node | None:
    """The tensor whose even columns are the gate and whose odd ones are up; None if there is none."""
    if op_name(gate) != "slice" or op_name(up) != "slice" or gate.args[0] is not up.args[0]:
        return None
    x = gate.args[0]
    last, columns = value(x).dim() - 1, value(x).shape[-1]
    for node, first in ((gate, 0), (up, 1)):
        dim, start, end, step = (*node.args[1:], *(0, 0, sys.maxsize, 1)[len(node.args) - 1 :])
        if dim not in (last, -1) or start != first or end != sys.maxsize or step != 2:
            return None
    return x if columns % 2 == 0 else None


def _swiglu_oai(root: Node) -> tuple[str, dict] | None:
    """(the fused op, the arguments of its activation) if `root` is gpt-oss' gate."""
    found = match(_SWIGLU_OAI, root)
    if found is None or any(isinstance(found[bound], Node) for bound in ("limit", "most", "least")):
        return None
    if not found["limit"] == found["most"] == -found["least"] > 0:
        return None
    x = _alternating(found["gate"], found["up"])
    if x is None or value(x).dtype != value(root).dtype:
        return None
    return "swiglu_oai_transform_quantize", {"x": x, "limit": float(found["limit"])}


def _plain(root: Node) -> tuple[str, dict] | None:
    """(the fused op, the arguments of its activation) if `root` is an activation without a gate."""
    for kind, activation in ACTIVATIONS.items():
        found = match(activation, root)
        if found is not None and value(found["x"]).dtype == value(root).dtype and _in_fp32(found):
            return "activation_transform_quantize", {"x": found["x"], "kind": kind}
    return None


def fuse_activation(graph: Graph) -> int:
    """Fuses each quantizer with the activation before it; the number fused."""
    fused = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize"):
            continue
        quantizer = arguments(node)
        x = quantizer["x"]
        if only_user(x, node) and (found := _gated(x) or _swiglu_oai(x) or _plain(x)) is not None:
            op, activation = found
            replace(node, insert_op(graph, node, op, quantizer | activation, val=value(node)))
            fused += 1
    return fused
