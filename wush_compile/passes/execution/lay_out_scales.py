"""Chooses how the scales of an activation lie in memory between its quantizer and its products.

    codes, scales = transform_quantize(x, ..)  ->  codes, scales = transform_quantize(x, .., "swizzled")
    fp4_linear(codes, scales, ..)              ->  fp4_linear(codes, scales, .., "swizzled")

Blackwell's block-scaled products read swizzled scales (`ops/layouts.py`). Without this pass, such a product swizzles
the activation's scales in every call. The pass has not run on a Blackwell GPU: tests run it with pretended providers.

The layout does not change which provider computes a call. Scales are swizzled only if the provider of the quantizer,
and those of all its products, take the call in both layouts, for every number of rows that the graph allows.
"""

import operator

import torch
from torch.fx import Graph, Node

from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.schema import positional
from ..pattern import arguments, fakes, is_wush, value


def _swizzled(node: Node) -> dict:
    """The arguments of a call, with swizzled scales."""
    return arguments(node) | {"scale_layout": "swizzled"}


def _takes_both_layouts(node: Node) -> bool:
    """Whether the GPU provider that computes a call also computes it with swizzled scales."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type != "cuda":
        return False
    by_layout = (tuple(named.values()) for named in (arguments(node), _swizzled(node)))
    in_rows, swizzled = (kernels.chosen(op, device.index, fakes(args)) for args in by_layout)
    return in_rows is not None and in_rows == swizzled


def _products(quantizer: Node) -> list[Node]:
    """The products of a quantizer's result; none if anything else reads its scales."""
    scales = [part for part in quantizer.users if part.target is operator.getitem and part.args[1] == 1]
    readers = [reader for part in scales for reader in part.users]
    for reader in readers:
        if not is_wush(reader, "fp4_linear") or [n for n, a in arguments(reader).items() if a in scales] != ["scales"]:
            return []
    return readers if all(user.target is operator.getitem for user in quantizer.users) else []


def lay_out_scales(graph: Graph) -> int:
    """Swizzles scales between quantizers and products that both take them so; the number of quantizers changed."""
    changed = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize", *FUSED_REFERENCE) or arguments(node)["scale_layout"] != "rows":
            continue
        products = _products(node)
        if not products or not all(map(_takes_both_layouts, (*products, node))):
            continue
        for call in (node, *products):
            call.args, call.kwargs = positional(call.target._opname, _swizzled(call)), {}
            call.meta.pop("eager_input_vals", None)  # Inductor matches them with the arguments, one by one
        with torch.no_grad():
            node.meta["val"] = node.target(*fakes(node.args))
        for part in node.users:
            part.meta["val"] = value(node)[part.args[1]]
        changed += 1
    return changed
