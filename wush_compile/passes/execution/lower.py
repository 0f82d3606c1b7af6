"""From wush ops to what runs on the target device.

`lower` (execution): which variant of a fused op. Ops stay what they are, since the dispatcher picks the provider of
their device at run time, from buffers that already have the device's layout. But where a GPU's provider has a kernel
for the quantizer and none for the fused variant, the op is taken apart again: Inductor compiles the norm or activation.

`inline` (packaging): no op that needs Python is left. On a GPU each becomes launches of the Triton kernels that suit
its compute capability (`kernels/packaged.py`); elsewhere, and where those kernels do not take it, the constant-free
ATen arithmetic that defines it.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ... import formats
from ...kernels import dispatch as kernels
from ...ops.fused import FUSED_REFERENCE
from ...ops.core import block_transform
from ..pattern import arguments, freeze, is_wush, layout, op_name, replace, value

# What makes tensors out of nothing in `kernels/packaged.py`: equal ones of a program become one.
_SOURCES = ("arange", "mul", "add", "full", "zeros")


# -- the arithmetic --------------------------------------------------------------------------------------------------

def _transform_quantize(x, transform, global_scale, format, scale_rule):
    return formats.quantize(block_transform(x, transform), format, scale_rule, global_scale)


def _fp4_linear(
    codes, scales, global_scale, weight_codes, weight_scales, weight_global_scale, bias, residual, format, out_dtype
) -> Tensor:
    x = formats.dequantize(codes, scales, format)                         # [.., K]
    w = formats.dequantize(weight_codes, weight_scales, format)           # [N, K]
    y = torch.nn.functional.linear(x, w)                                  # [.., N]
    factors = [g for g in (global_scale, weight_global_scale) if g is not None]
    if factors:
        y = y * (1.0 / (factors[0] if len(factors) == 1 else factors[0] * factors[1]))
    if bias is not None:
        y = y + bias.to(torch.float32)
    y = y.to(out_dtype)
    return y if residual is None else y + residual


# The reference of ops.py without its eager tricks (tables, chunks), which a graph cannot hold: the same numbers.
ARITHMETIC: dict[str, Callable] = {"transform_quantize": _transform_quantize, "fp4_linear": _fp4_linear}


# -- tracing and pasting ---------------------------------------------------------------------------------------------

def _trace(body: Callable, args: tuple, decompositions: dict | None) -> Graph:
    """The ATen graph of `body`; its placeholders are the tensors among the arguments, in order."""
    tensors = [a for a in args if isinstance(a, Node)]

    def on_tensors(*values):
        given = iter(values)
        return body(*(next(given) if isinstance(a, Node) else a for a in args))

    fakes = [value(n) for n in tensors]
    # Tensors that the body makes are fake too; shapes stay symbols in what ATen composes in C++.
    with torch.no_grad(), detect_fake_mode(fakes), enable_python_dispatcher():
        return make_fx(on_tensors, decompositions)(*fakes).graph


def _paste(graph: Graph, node: Node, traced: Graph) -> list[Node]:
    """Replaces a call by a traced graph on the same tensors; the new nodes."""
    tensors = [a for a in arguments(node).values() if isinstance(a, Node)]
    copied: dict[Node, Node] = {}
    given = iter(tensors)
    with graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "placeholder":
                copied[inner] = next(given)
            elif inner.op == "output":
                result = torch.fx.map_arg(inner.args[0], copied.__getitem__)
            else:
                copied[inner] = graph.node_copy(inner, copied.__getitem__)
                place = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
                copied[inner].meta.update(place)
    if isinstance(result, Node):
        node.replace_all_uses_with(result, propagate_meta=False)
    else:
        for part in list(node.users):                                      # getitems
            part.replace_all_uses_with(result[part.args[1]], propagate_meta=False)
            graph.erase_node(part)
    graph.erase_node(node)
    return [copied[n] for n in traced.nodes if n.op not in ("placeholder", "output")]


def _replace_by(
    graph: Graph, nodes: list[Node], body_of: Callable[[Node], Callable], decompositions: dict | None = None
) -> list[Node]:
    """Replaces each node by the graph of its body; the new nodes."""
    traced: dict[tuple, Graph] = {}                                        # decoder layers are alike: trace one
    new: list[Node] = []
    for node in nodes:
        key = node.target, freeze(arguments(node), layout)
        if key not in traced:
            traced[key] = _trace(body_of(node), tuple(arguments(node).values()), decompositions)
        new += _paste(graph, node, traced[key])
    return new


def _fakes(node: Node) -> tuple:
    return torch.fx.map_arg(tuple(arguments(node).values()), value)


# -- execution -------------------------------------------------------------------------------------------------------

def _taken(op: str, device: int, args: tuple) -> bool:
    return any(kernel.refuses(*args) is None for _, kernel in kernels.resolve(device).get(op, ()))


def _without_kernel(node: Node) -> bool:
    """Whether a fused op's GPU has a kernel for the quantizer, and none for the fused op."""
    device, args = value(node.all_input_nodes[0]).device, _fakes(node)
    return device.type == "cuda" and not _taken(node.target._opname, device.index, args) and _taken(
        "transform_quantize", device.index, (args[0], *args[-4:])
    )


def _fused_ops(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if is_wush(node, *FUSED_REFERENCE)]


def lower(graph: Graph) -> int:
    """Takes fused ops apart where their GPU's provider has a kernel for the quantizer only; how many."""
    nodes = [node for node in _fused_ops(graph) if _without_kernel(node)]
    if nodes:
        from torch._inductor.decomposition import select_decomp_table

        _replace_by(graph, nodes, lambda node: FUSED_REFERENCE[node.target._opname], select_decomp_table())
    return len(nodes)


# -- packaging -------------------------------------------------------------------------------------------------------

def _body(node: Node) -> Callable:
    """What a package computes in place of an op: Triton launches, or arithmetic."""
    op, device = node.target._opname, value(node.all_input_nodes[0]).device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        triton = next(provider for provider in kernels.PROVIDERS if provider.name == "triton")
        if triton.unavailable(capability) is None:
            from ...kernels.triton import packaged

            if packaged.refuses(op, capability, *_fakes(node)) is None:
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


def inline(graph: Graph) -> int:
    """Replaces every wush op by what a package can hold; the number replaced."""
    fused = _fused_ops(graph)
    _replace_by(graph, fused, lambda node: FUSED_REFERENCE[node.target._opname])
    nodes = [node for node in graph.nodes if is_wush(node, *ARITHMETIC)]
    _share(_replace_by(graph, nodes, _body))
    if nodes:
        graph.eliminate_dead_code()
    return len(nodes)
