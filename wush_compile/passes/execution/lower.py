"""Chooses the variant of each fused op for the target device.

The dispatcher picks an op's provider at run time, so ops usually stay as they are. Where a GPU's provider has a kernel
for the quantizer but none for the fused variant, the fused op is taken apart: Inductor compiles the norm or activation.
"""

from torch.fx import Graph, Node

from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.schema import bind, schema
from ..pattern import arguments, fakes, is_wush, value
from .paste import replace_by


def _quantizer(op: str, args: tuple) -> tuple:
    """What `transform_quantize` is called with where a fused op is taken apart: the norm's or activation's result has
    the layout of its first argument."""
    call = bind(op, args)
    return args[0], *(call[p.name] for p in schema("transform_quantize").arguments[1:])


def _without_kernel(node: Node) -> bool:
    """Whether a fused op's GPU has a kernel for the quantizer, and none for the fused op."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type != "cuda":
        return False
    args = fakes(tuple(arguments(node).values()))
    quantizer = "transform_quantize", device.index, _quantizer(op, args)
    return kernels.chosen(op, device.index, args) is None and kernels.chosen(*quantizer) is not None


def fused_ops(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if is_wush(node, *FUSED_REFERENCE)]


def lower(graph: Graph) -> int:
    """Takes fused ops apart where their GPU's provider has a kernel for the quantizer only; how many."""
    nodes = [node for node in fused_ops(graph) if _without_kernel(node)]
    if nodes:
        from torch._inductor.decomposition import select_decomp_table

        replace_by(graph, nodes, lambda node: FUSED_REFERENCE[node.target._opname], select_decomp_table())
    return len(nodes)
