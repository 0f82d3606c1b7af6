"""Cuts a part out of a stage's graph: what leads from values that are there to values that are wanted."""

import operator
from collections.abc import Container, Iterable
from typing import NamedTuple

import torch
from torch import fx

from ..pattern import has_effect
from .observe import OBSERVERS


class Part(NamedTuple):
    """`graph_module(*inputs) -> (the wanted values, then those of `border`)`. It shares the stage's tensors.

    inputs   the names of the stage's values that it reads
    border   the names of values that it computes and that the rest of the stage reads, if they were asked for
    """

    graph_module: fx.GraphModule
    inputs: list[str]
    border: list[str]


def _asserts(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "").startswith(("_assert", "sym_constrain"))


def _only_draws(node: fx.Node) -> bool:
    """Whether an op counts as impure because it may draw random numbers, as attention with dropout may."""
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return seeded and not target._schema.is_mutable


def _checks_metadata(node: fx.Node) -> bool:
    """Whether a node asserts what a traced graph knows anyway: dtypes, devices."""
    return getattr(node.target, "_opname", "") == "_assert_tensor_metadata"


def _acts(node: fx.Node) -> bool:
    """Whether a node does something besides its result: it writes into an argument, or opens a level of `vmap`."""
    if node.op != "call_function" or node.target in OBSERVERS or _asserts(node):
        return False
    return has_effect(node) and not _only_draws(node)


def _stays(node: fx.Node) -> bool:
    """Whether each part of a graph has this node: one that acts, or that asserts something about the data."""
    return _acts(node) or (_asserts(node) and not _checks_metadata(node))


def resumable(graph_module: fx.GraphModule) -> bool:
    """Whether a graph may be run in parts: no op but observers writes into its arguments or opens a level of `vmap`."""
    return not any(map(_acts, graph_module.graph.nodes))


def leading_to(graph_module: fx.GraphModule, wanted: Iterable[fx.Node], given: Container[str]) -> set[fx.Node]:
    """Returns the nodes that lead from the given values and the graph's inputs to these nodes, all included, and
    assertions."""
    found: set[fx.Node] = set()
    left = [*wanted, *filter(_stays, graph_module.graph.nodes)]
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += () if node.name in given else node.all_input_nodes
    nodes = graph_module.graph.nodes
    return found | {node for node in nodes if _checks_metadata(node) and found.issuperset(node.all_input_nodes)}


def cut(
    graph_module: fx.GraphModule,
    wanted: Iterable[fx.Node],
    given: Container[str] = (),
    returns: bool = True,
    border: bool = False,
) -> Part:
    """Cuts out what leads to the wanted nodes. The part returns them, and its border if that is asked for.

    given   the names of values of the graph that need not be computed
    """
    wanted = list(wanted)
    inside = leading_to(graph_module, wanted, given)
    last: list[fx.Node] = []
    if border:
        # A tuple is no value that can be kept: its elements are.
        inside |= {u for node in inside for u in node.users if u.target is operator.getitem}
        last = [
            node
            for node in graph_module.graph.nodes
            if node in inside
            and node.op == "call_function"
            and node.name not in given
            and not all(u in inside or u.target in OBSERVERS for u in node.users)
        ]
    graph, copied, inputs = fx.Graph(), {}, []
    for node in graph_module.graph.nodes:
        if node in inside:
            if node.op == "placeholder" or node.name in given:
                copied[node] = graph.placeholder(node.name)
                inputs.append(node.name)
            else:
                copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in (*(wanted if returns else ()), *last)))
    return Part(fx.GraphModule(graph_module, graph), inputs, [node.name for node in last])
