"""Takes fused ops apart for which the target device has no kernel.

The dispatcher picks an op's provider at run time, so an op usually stays as it is. But if a GPU has a kernel for the
quantizer and none for the fused op, the fused op becomes a norm or activation, which Inductor compiles, and the
quantizer.
"""

from torch.fx import Graph, Node

from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.schema import bind, schema
from ..pattern import arguments, fakes, is_wush, value
from .paste import replace_by


def _quantizer(op: str, args: tuple) -> tuple:
    """The arguments of `transform_quantize` after a fused op is taken apart.

    The result of the norm or activation has the shape, dtype and strides of the fused op's first argument, or half its
    columns.
    """
    call, x = bind(op, args), args[0]
    if op == "swiglu_oai_transform_quantize":
        x = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    return x, *(call[p.name] for p in schema("transform_quantize").arguments[1:])


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
    """Takes apart the fused ops whose GPU has a kernel for the quantizer only; the number taken apart."""
    nodes = [node for node in fused_ops(graph) if _without_kernel(node)]
    if nodes:
        from torch._inductor.decomposition import select_decomp_table

        replace_by(graph, nodes, lambda node: FUSED_REFERENCE[node.target._opname], select_decomp_table())
    return len(nodes)
