"""From wush ops to what runs on the target.

Most ops stay what they are: the dispatcher picks the provider of their device at run time, from buffers that already
have the device's layout. Where no Python may be needed at run time (a packaged program), `inline` replaces each op by
the constant-free ATen arithmetic that defines it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from .. import formats
from ..fused_ops import rms_norm
from ..ops import block_transform
from .pattern import arguments, is_wush, value


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


def _rms_norm(x, weight, eps, eps_tensor, gain, *quantizer):
    eps = eps if eps_tensor is None else eps_tensor.to(torch.float32)
    return _transform_quantize(rms_norm(x, weight, eps, gain), *quantizer)


def _layer_norm(x, weight, bias, eps, eps_tensor, *quantizer):
    eps = eps if eps_tensor is None else float(eps_tensor)
    return _transform_quantize(torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps), *quantizer)


def _silu_mul(gate, up, *quantizer):
    return _transform_quantize(torch.nn.functional.silu(gate) * up, *quantizer)


def _gelu_mul(gate, up, approximate, *quantizer):
    return _transform_quantize(torch.nn.functional.gelu(gate, approximate=approximate) * up, *quantizer)


# The reference of ops.py without its eager tricks (tables, chunks), which a graph cannot hold: the same numbers.
INLINE: dict[str, Callable] = {
    "transform_quantize": _transform_quantize,
    "fp4_linear": _fp4_linear,
    "rms_norm_transform_quantize": _rms_norm,
    "layer_norm_transform_quantize": _layer_norm,
    "silu_mul_transform_quantize": _silu_mul,
    "gelu_mul_transform_quantize": _gelu_mul,
}


def _trace(body: Callable, args: tuple) -> Graph:
    """The ATen graph of `body`; its placeholders are the tensors among the arguments, in order."""
    tensors = [a for a in args if isinstance(a, Node)]

    def on_tensors(*values):
        given = iter(values)
        return body(*(next(given) if isinstance(a, Node) else a for a in args))

    with torch.no_grad():
        return make_fx(on_tensors)(*map(value, tensors)).graph


def _signature(node: Node) -> tuple:
    """What the traced graph depends on: the op, its literals, and the layout of its tensors."""
    def of(argument):
        if not isinstance(argument, Node):
            return argument
        fake = value(argument)
        return str(fake.shape), str(fake.stride()), fake.dtype, fake.device

    return node.target, *map(of, arguments(node).values())


def _paste(graph: Graph, node: Node, traced: Graph) -> None:
    """Replaces a call by a traced graph on the same tensors."""
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


def inline(graph: Graph) -> int:
    """Replaces every wush op by the arithmetic that defines it; the number replaced."""
    nodes = [node for node in graph.nodes if is_wush(node) and node.target._opname in INLINE]
    traced: dict[tuple, Graph] = {}                                        # decoder layers are alike: trace one
    for node in nodes:
        key = _signature(node)
        if key not in traced:
            traced[key] = _trace(INLINE[node.target._opname], tuple(arguments(node).values()))
        _paste(graph, node, traced[key])
    if nodes:
        graph.eliminate_dead_code()
    return len(nodes)
