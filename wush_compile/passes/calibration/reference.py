"""A stage of the unquantized model, which runs beside the quantized one for `solver/correction.py`."""

from collections.abc import Iterable

from torch import fx

from .dataflow import depend_on
from .group import LinearGroup
from .observe import OBSERVERS
from .partition import Stage


def unobserved(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Returns a copy of a graph without observers, with the names of all nodes. It shares the tensors."""
    graph, copies = fx.Graph(), {}
    for node in graph_module.graph.nodes:
        if node.target not in OBSERVERS:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(graph_module, graph)


def sources(graph_module: fx.GraphModule, groups: Iterable[LinearGroup]) -> list[fx.Node]:
    """Returns the nodes of a graph, as they were before it was rewritten, that are the inputs of these groups."""
    by_name = {node.name: node for node in graph_module.graph.nodes}
    return [by_name[group.source.name] for group in groups]


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
        behind[step] |= depend_on(graph, [by_name[linear.node.name] for linear in group.linears])
    return steps
