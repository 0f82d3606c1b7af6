"""Replaces a node by the traced graph of a Python function."""

import itertools
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


def _branch(graph: Graph, node: Node) -> Node:
    """The branch of a `torch.cond` that a node of a traced graph names, in `graph`."""
    owner, branch = graph.owning_module, getattr(node.graph.owning_module, node.target)
    name = next((name for name, module in owner.named_children() if module is branch), None)
    if name is None:
        free = (f"wush_branch_{i}" for i in itertools.count())
        name = next(name for name in free if not hasattr(owner, name))
        owner.add_module(name, branch)
    return graph.get_attr(name)


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
            elif inner.op == "get_attr":
                copied[inner] = _branch(graph, inner)
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
        body = body_of(node)
        key = node.target, freeze(arguments(node), layout), getattr(body, "args", ())
        if key not in traced:
            traced[key] = _trace(body, tuple(arguments(node).values()), decompositions)
        new += _paste(graph, node, traced[key])
    return new
