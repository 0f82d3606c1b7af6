"""Chooses how an activation lies in memory between its quantizer and its products.

    codes, scales = transform_quantize(x, ..)  ->  codes, scales = transform_quantize(x, .., "swizzled")
    fp4_linear(codes, scales, ..)              ->  fp4_linear(codes, scales, .., "swizzled")

Blackwell's block-scaled products read swizzled scales (`ops/layouts.py`). Without this pass, such a product swizzles
the activation's scales in every call. The pass has not run on a Blackwell GPU: tests run it with pretended providers.

Activations get the layout `lanes` in the same way, where Hopper's products read it: without this pass a kernel puts
activations of 8 and 16 bits in that order in every call, and expands those of 4 bits.

The layout does not change which provider computes a call. It is changed only if the provider of the quantizer, and
those of all its products, take the call in both layouts, for every number of rows that the graph allows.
"""

import operator

import torch
from torch.fx import Graph, Node

from ...formats import ACTIVATION_FORMATS
from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.layouts import layouts_of
from ...ops.schema import positional
from ..pattern import arguments, fakes, is_wush, value


def _laid_out(node: Node, layout: str) -> dict:
    """The arguments of a call, with this layout."""
    return arguments(node) | {"scale_layout": layout}


def _takes_both_layouts(node: Node, layout: str) -> bool:
    """Whether the GPU provider that computes a call with rows also computes it with this layout."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type != "cuda":
        return False
    by_layout = (tuple(named.values()) for named in (arguments(node), _laid_out(node, layout)))
    in_rows, laid_out = (kernels.chosen(op, device.index, fakes(args)) for args in by_layout)
    return in_rows is not None and in_rows == laid_out


def _products(quantizer: Node, parts: tuple[str, ...]) -> list[Node]:
    """The products of a quantizer's result; none if anything else reads the parts of it that the layout changes."""
    found = []
    for part in quantizer.users:
        if part.target is not operator.getitem:
            return []
        name = {0: "codes", 1: "scales"}.get(part.args[1])
        for reader in part.users if name in parts else ():
            reads = [n for n, a in arguments(reader).items() if a is part] if is_wush(reader, "fp4_linear") else []
            if reads != [name]:
                return []
            found.append(reader)
    return list(dict.fromkeys(found))


def _change(quantizer: Node) -> tuple[str, list[Node]] | None:
    """The first layout other than rows that a quantizer and all its products take, and these products."""
    format = arguments(quantizer)["format"]
    width = value(quantizer)[0].shape[-1] * (1 if format in ACTIVATION_FORMATS else 2)
    for layout in layouts_of(format, width)[1:]:
        products = _products(quantizer, ("scales",) if layout == "swizzled" else ("codes", "scales"))
        if products and all(_takes_both_layouts(call, layout) for call in (*products, quantizer)):
            return layout, products
    return None


def lay_out_scales(graph: Graph) -> int:
    """Changes the layout between quantizers and products that both take another; the number of quantizers changed."""
    changed = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize", *FUSED_REFERENCE) or arguments(node)["scale_layout"] != "rows":
            continue
        found = _change(node)
        if found is None:
            continue
        layout, products = found
        for call in (node, *products):
            call.args, call.kwargs = positional(call.target._opname, _laid_out(call, layout)), {}
            call.meta.pop("eager_input_vals", None)  # Inductor matches them with the arguments, one by one
        with torch.no_grad():
            node.meta["val"] = node.target(*fakes(node.args))
        for part in node.users:
            part.meta["val"] = value(node)[part.args[1]]
        changed += 1
    return changed
