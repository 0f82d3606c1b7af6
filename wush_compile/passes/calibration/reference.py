"""A stage of the unquantized model, which runs beside the quantized one for `solver/correction.py`."""

from collections.abc import Iterable

import torch
from torch import fx

from .cut import resumable
from .dataflow import change_with
from .group import LinearGroup
from .observe import OBSERVERS
from .partition import Stage


def _copied(number: int) -> str:
    """Returns the name of the copy of a group's input."""
    return f"wush_source_{number}"


def unobserved(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph without observers, with the names of all nodes. It shares the tensors.

    Where ops overwrite values, a copy of its input stands in the place of a group's observer.
    """
    graph, copies, overwrites = fx.Graph(), {}, not resumable(graph_module)
    for node in graph_module.graph.nodes:
        if node.target not in OBSERVERS:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif overwrites and node.target is torch.ops.wush.observe_cross.default:
            name = _copied(node.meta["wush_group"])
            graph.create_node("call_function", torch.ops.aten.clone.default, (copies[node.args[0]],), name=name)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(graph_module, graph)


def sources(graph_module: fx.GraphModule, groups: Iterable[tuple[int, LinearGroup]]) -> list[fx.Node]:
    """Returns the nodes of an `unobserved` graph that are the inputs of these groups, (number, group)."""
    by_name = {node.name: node for node in graph_module.graph.nodes}
    return [by_name.get(_copied(number)) or by_name[group.source.name] for number, group in groups]


def in_turn(stage: Stage, groups: Iterable[tuple[int, LinearGroup]]) -> list[list[int]]:
    """Returns the numbers of a stage's groups in the fewest steps: a group comes after all that its input depends on.

    groups   (number, group) in the order of the graph, before any of them is rewritten
    """
    graph = stage.graph_module.graph
    by_name = {node.name: node for node in graph.nodes}
    steps: list[list[int]] = []
    behind: list[set[fx.Node]] = []  # what depends on the groups of each step
    for number, group in groups:
        source = by_name[group.source.name]
        step = max((k + 1 for k, nodes in enumerate(behind) if source in nodes), default=0)
        if step == len(steps):
            steps.append([])
            behind.append(set())
        steps[step].append(number)
        behind[step] |= change_with(graph, [by_name[linear.node.name] for linear in group.linears])
    return steps
