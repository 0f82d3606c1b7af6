"""Cuts the whole-model graph into stages: what comes before the first repeated layer, each layer, and the rest.

A stage has its own graph. Its inputs are values of earlier stages. It shares the model's weights, by name. The chained
stages compute exactly what the whole graph computes.
"""

import re
from dataclasses import dataclass

from torch import fx

_INDEXED = re.compile(r"(?:^|\.)\d+$")


@dataclass
class Stage:
    """One part of the graph: `graph_module(*inputs) -> tuple(outputs)`. Values have the whole graph's node names."""

    name: str
    graph_module: fx.GraphModule
    inputs: list[str]
    outputs: list[str]


def _layer_of(node: fx.Node) -> str | None:
    """Returns the path of the outermost list element that the node belongs to (`model.layers.3`)."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return next((path for path, _ in stack if _INDEXED.search(path)), None)


def assign_stages(graph: fx.Graph) -> tuple[dict[fx.Node, int], list[str]]:
    """Returns every computing node's stage number, which never decreases along the graph, and the stages' names."""
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    layers = [_layer_of(n) for n in nodes]
    last_layer_node = max((i for i, layer in enumerate(layers) if layer is not None), default=-1)
    names, current, stage_of = ["inputs"], 0, {}
    for i, (node, layer) in enumerate(zip(nodes, layers, strict=True)):
        if i == last_layer_node + 1 and last_layer_node >= 0:
            names.append("outputs")
        elif layer is not None and layer not in names:
            names.append(layer)
        current = max(current, len(names) - 1)
        stage_of[node] = current
    return stage_of, names


def partition(graph_module: fx.GraphModule) -> list[Stage]:
    """Cuts the graph at the borders of repeated layers. Returns the stages in execution order."""
    graph = graph_module.graph
    stage_of, names = assign_stages(graph)
    output = next(n for n in graph.nodes if n.op == "output")
    stages = []
    for number, name in enumerate(names):
        part, copies, inputs = fx.Graph(), {}, []
        members = [n for n in graph.nodes if stage_of.get(n) == number]

        for node in dict.fromkeys(a for n in members for a in n.all_input_nodes):
            if node.op != "get_attr" and stage_of.get(node) != number:
                copies[node] = part.placeholder(node.name)
                copies[node].meta = dict(node.meta)
                inputs.append(node.name)

        def fetch(node: fx.Node, part: fx.Graph = part, copies: dict = copies) -> fx.Node:
            if node not in copies:  # a weight: all other nodes have already been copied in order
                copies[node] = part.node_copy(node)
            return copies[node]

        for node in members:
            copies[node] = part.node_copy(node, fetch)
        outputs = [n for n in members if any(u is output or stage_of.get(u, number) > number for u in n.users)]
        part.output(tuple(copies[n] for n in outputs))
        stages.append(Stage(name, fx.GraphModule(graph_module, part), inputs, [n.name for n in outputs]))
    return stages
