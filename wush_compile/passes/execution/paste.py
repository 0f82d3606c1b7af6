"""Replaces a node by the traced graph of a Python function."""

from collections.abc import Callable

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ..pattern import arguments, freeze, layout, value


def _trace(body: Callable, args: tuple, decompositions: dict | None) -> Graph:
    """The ATen graph of `body`; its placeholders are the tensors among the arguments, in order."""
    tensors = [a for a in args if isinstance(a, Node)]

    def on_tensors(*values):
        given = iter(values)
        return body(*(next(given) if isinstance(a, Node) else a for a in args))

    fakes = [value(n) for n in tensors]
    # New tensors of the body are fake too. The dispatcher keeps shapes symbolic in ops that ATen composes in C++.
    with torch.no_grad(), detect_fake_mode(fakes), enable_python_dispatcher():
        return make_fx(on_tensors, decompositions)(*fakes).graph


def _paste(graph: Graph, node: Node, traced: Graph) -> list[Node]:
    """Replaces a call by a traced graph on the same tensors; returns the new nodes."""
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
        for part in list(node.users):  # getitems
            part.replace_all_uses_with(result[part.args[1]], propagate_meta=False)
            graph.erase_node(part)
    graph.erase_node(node)
    return [copied[n] for n in traced.nodes if n.op not in ("placeholder", "output")]


def replace_by(
    graph: Graph, nodes: list[Node], body_of: Callable[[Node], Callable], decompositions: dict | None = None
) -> list[Node]:
    """Replaces each node by the traced graph of its body; returns the new nodes."""
    # torch.export names inputs without telling the graph, which would then give an op the name of an input.
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)
    traced: dict[tuple, Graph] = {}  # decoder layers are alike: each call is traced once
    new: list[Node] = []
    for node in nodes:
        key = node.target, freeze(arguments(node), layout)
        if key not in traced:
            traced[key] = _trace(body_of(node), tuple(arguments(node).values()), decompositions)
        new += _paste(graph, node, traced[key])
    return new
