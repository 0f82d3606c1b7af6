"""Tells which values of a graph depend on which inputs."""

from collections.abc import Iterable

from torch import Tensor, fx


def depend_on(graph: fx.Graph, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes whose values depend on these nodes, which it includes. To depend on a size does not count."""
    reached = set(inputs)
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), (Tensor, tuple, list)) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
