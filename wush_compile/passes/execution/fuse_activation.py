"""Fuses a gated activation into the quantizer that it feeds.

    transform_quantize(silu(gate) * up, T, ..)  ->  silu_mul_transform_quantize(gate, up, T, ..)

GELU likewise, exact and tanh. The activation is one ATen op (export) or decomposed (Inductor). Both compute it in fp32
and round it to the model dtype before the product with `up`.
"""

import torch
from torch.fx import Graph, Node

from ..pattern import Cast, Either, Op, Var, arguments, insert_op, is_wush, match, only_user, replace, value

_G = Cast(Var("gate"), bind="wide")
_SIGMOID_FORMS = (
    Op("div", _G, Op("add", Op("exp", Op("neg", _G)), 1)),
    Op("mul", _G, Op("sigmoid", _G)),
)
_CUBE = Either(Op("mul", Op("mul", _G, _G), _G), Op("pow", _G, 3))
_TANH = Op("tanh", Op("mul", Op("add", _G, Op("mul", _CUBE, 0.044715)), 0.7978845608028654))
_ERF = Op("erf", Op("mul", _G, 0.7071067811865476))
_HALF = Op("mul", _G, 0.5)
# (op, how GELU is approximated) -> what its activation looks like
ACTIVATIONS = {
    ("silu_mul_transform_quantize", None): Either(Op("silu", Var("gate")), *map(Cast, _SIGMOID_FORMS)),
    ("gelu_mul_transform_quantize", "tanh"): Either(
        Op("gelu", Var("gate"), "tanh"), Cast(Op("mul", _HALF, Op("add", _TANH, 1)))
    ),
    ("gelu_mul_transform_quantize", "none"): Either(
        Op("gelu", Var("gate")), Op("gelu", Var("gate"), "none"), Cast(Op("mul", _HALF, Op("add", _ERF, 1)))
    ),
}


def _gated(root: Node) -> tuple[str, dict] | None:
    """(the fused op, the arguments of its activation) if `root` is a gated activation."""
    for (op, approximate), activation in ACTIVATIONS.items():
        found = match(Op("mul", activation, Var("up")), root)
        if found is None:
            continue
        activated = next(a for a in root.args if a is not found["up"])
        gate, up, wide = value(found["gate"]), value(found["up"]), found.get("wide")
        if gate.shape != up.shape or not gate.dtype == up.dtype == value(activated).dtype == value(root).dtype:
            continue
        if wide is None or value(wide).dtype == torch.float32:
            return op, {"gate": found["gate"], "up": found["up"], "approximate": approximate}
    return None


def fuse_activation(graph: Graph) -> int:
    """Fuses each quantizer with the gated activation before it; the number fused."""
    fused = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize"):
            continue
        quantizer = arguments(node)
        x = quantizer["x"]
        if only_user(x, node) and (found := _gated(x)) is not None:
            op, activation = found
            replace(node, insert_op(graph, node, op, quantizer | activation, val=value(node)))
            fused += 1
    return fused
