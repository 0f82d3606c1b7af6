"""Packaging: replaces every wush op by what runs without Python.

On a GPU an op becomes launches of the Triton kernels that suit its compute capability (`kernels/triton/packaged.py`).
Elsewhere, and where those kernels refuse the call, it becomes the ATen arithmetic that defines it, free of constants.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ... import formats
from ...kernels import dispatch as kernels
from ...ops.core import block_transform
from ...ops.fused import FUSED_REFERENCE
from ..pattern import freeze, is_wush, op_name, replace, value
from .lower import fakes, fused_ops
from .paste import replace_by

# What makes tensors out of nothing in `kernels/triton/packaged.py`: equal ones of a program become one.
_SOURCES = ("arange", "mul", "add", "full", "zeros")


def _transform_quantize(x, transform, global_scale, format, scale_rule):
    return formats.quantize(block_transform(x, transform), format, scale_rule, global_scale)


def _fp4_linear(
    codes, scales, global_scale, weight_codes, weight_scales, weight_global_scale, bias, residual, format, out_dtype
) -> Tensor:
    x = formats.dequantize(codes, scales, format)  # [.., K]
    w = formats.dequantize(weight_codes, weight_scales, format)  # [N, K]
    y = torch.nn.functional.linear(x, w)  # [.., N]
    factors = [g for g in (global_scale, weight_global_scale) if g is not None]
    if factors:
        y = y * (1.0 / (factors[0] if len(factors) == 1 else factors[0] * factors[1]))
    if bias is not None:
        y = y + bias.to(torch.float32)
    y = y.to(out_dtype)
    return y if residual is None else y + residual


# The reference of ops.py without its eager tricks (tables, chunks), which a graph cannot hold: the same numbers.
ARITHMETIC: dict[str, Callable] = {"transform_quantize": _transform_quantize, "fp4_linear": _fp4_linear}


def _body(node: Node) -> Callable:
    """What a package computes in place of an op: Triton launches, or arithmetic."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        triton = next(provider for provider in kernels.PROVIDERS if provider.name == "triton")
        if triton.unavailable(capability) is None:
            from ...kernels.triton import packaged

            if packaged.refuses(op, capability, *fakes(node)) is None:
                return functools.partial(packaged.PACKAGED[op], capability)
    return ARITHMETIC[op]


def _share(new: list[Node]) -> None:
    """Merges equal constants among pasted nodes. The counters of split products too: each product leaves them zero."""
    seen: dict[tuple, Node] = {}
    for node in new:
        if op_name(node) in _SOURCES and all(n in seen.values() for n in node.all_input_nodes):
            first = seen.setdefault((node.target, freeze(node.args), freeze(node.kwargs)), node)
            if first is not node:
                replace(node, first)


def package(graph: Graph) -> int:
    """Replaces every wush op by what a package can hold; the number replaced."""
    fused = fused_ops(graph)
    replace_by(graph, fused, lambda node: FUSED_REFERENCE[node.target._opname])
    nodes = [node for node in graph.nodes if is_wush(node, *ARITHMETIC)]
    _share(replace_by(graph, nodes, _body))
    if nodes:
        graph.eliminate_dead_code()
    return len(nodes)
