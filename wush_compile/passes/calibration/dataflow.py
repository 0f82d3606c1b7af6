"""Tells which values of a graph depend on which inputs."""

from collections.abc import Iterable, Iterator

from torch import Tensor, fx
from torch._ops import OpOverload


def depend_on(graph: fx.Graph, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes whose values depend on these nodes, which it includes. To depend on a size does not count."""
    reached = set(inputs)
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), (Tensor, tuple, list)) and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def written_by(node: fx.Node) -> Iterator[fx.Node]:
    """Yields what an op writes into: arguments, and what they are views of."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return
    for given, argument in zip(node.args, node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, fx.Node):
            while given is not None:
                yield given
                given = _viewed(given)


def _viewed(node: fx.Node) -> fx.Node | None:
    """Returns what a node may be a view of, by the op's schema; None if its memory is its own."""
    if not isinstance(node.target, OpOverload):
        return None
    for given, argument in zip(node.args, node.target._schema.arguments):
        if argument.alias_info is not None and isinstance(given, fx.Node):
            return given
    return None


def change_with(graph: fx.Graph, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes that depend on these nodes, or whose memory what depends on them is written to."""
    reached = depend_on(graph, nodes)
    while written := {w for node in reached for w in written_by(node)} - reached:
        reached |= depend_on(graph, written)
    return reached
