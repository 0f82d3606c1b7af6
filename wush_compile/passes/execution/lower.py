"""Chooses the variant of each fused op for the target device.

The dispatcher picks an op's provider at run time, so ops usually stay as they are. Where a GPU's provider has a kernel
for the quantizer but none for the fused variant, the fused op is taken apart: Inductor compiles the norm or activation.
"""

import torch
from torch.fx import Graph, Node

from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.schema import bind, schema
from ..pattern import arguments, is_wush, value
from .paste import replace_by


def fakes(node: Node) -> tuple:
    return torch.fx.map_arg(tuple(arguments(node).values()), value)


def _accepts(op: str, device: int, args: tuple) -> bool:
    return any(kernel.refuses(*args) is None for _, kernel in kernels.resolve(device).get(op, ()))


def _quantizer(op: str, args: tuple) -> tuple:
    """What `transform_quantize` is called with where a fused op is taken apart: the norm's or activation's result has
    the layout of its first argument."""
    call = bind(op, args)
    return args[0], *(call[p.name] for p in schema("transform_quantize").arguments[1:])


def _without_kernel(node: Node) -> bool:
    """Whether a fused op's GPU has a kernel for the quantizer, and none for the fused op."""
    device, args = value(node.all_input_nodes[0]).device, fakes(node)
    return (
        device.type == "cuda"
        and not _accepts(node.target._opname, device.index, args)
        and _accepts("transform_quantize", device.index, _quantizer(node.target._opname, args))
    )


def fused_ops(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if is_wush(node, *FUSED_REFERENCE)]


def lower(graph: Graph) -> int:
    """Takes fused ops apart where their GPU's provider has a kernel for the quantizer only; how many."""
    nodes = [node for node in fused_ops(graph) if _without_kernel(node)]
    if nodes:
        from torch._inductor.decomposition import select_decomp_table

        replace_by(graph, nodes, lambda node: FUSED_REFERENCE[node.target._opname], select_decomp_table())
    return len(nodes)
