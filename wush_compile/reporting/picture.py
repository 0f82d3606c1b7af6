"""A graph as a picture: a box for each matmul, quantization, attention, norm and residual, from the top down."""

import torch
from torch.fx import Graph, Node

from ..graphs.printing import layer_of

# Other ops are passed through: their readers connect to what they read. `add` is drawn where it joins two boxes.
DRAWN = ("linear", "mm", "addmm", "bmm", "matmul", "scaled_dot_product", "attention", "norm", "silu", "gelu", "rsqrt")
WIDTH, HEIGHT, GAP = 190, 34, 22
MOST_BOXES = 60


def _label(node: Node) -> str:
    """The op as a box names it; empty for an op that is passed through."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target._opname
    if node.target.namespace == "wush":
        return f"wush.{name}"
    if "rsqrt" in name:
        return "norm"
    return name.strip("_") if any(part in name for part in DRAWN) else "add" if name == "add" else ""


def _shape(node: Node) -> str:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) and value else value
    return " x ".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else ""


def picture(graph: Graph, layer: int | None = None) -> dict | None:
    """Boxes and arrows of a graph, or of the nodes of one layer; None where nothing, or too much, is to be drawn.

    width, height   of the picture, in units of SVG
    boxes           dicts of x, y, label, shape
    arrows          (x1, y1, x2, y2)
    """
    sources: dict[Node, frozenset[Node]] = {}  # node -> the boxes that reach it through ops that are not drawn
    level: dict[Node, int] = {}
    links: set[tuple[Node, Node]] = set()
    for node in graph.nodes:
        if layer is not None and node.op == "call_function" and layer_of(node) not in (layer, None):
            continue
        above = frozenset().union(*(sources.get(i, frozenset()) for i in node.all_input_nodes))
        label = _label(node)
        if (
            not label
            or node.op == "output"
            or (layer is not None and layer_of(node) != layer)
            or label == "add"
            and len(above) < 2
        ):
            sources[node] = above
        else:
            level[node] = 1 + max((level[a] for a in above), default=-1)
            links |= {(a, node) for a in above}
            sources[node] = frozenset([node])
    if not level or len(level) > MOST_BOXES:
        return None
    rows: dict[int, list[Node]] = {}
    for node, depth in level.items():
        rows.setdefault(depth, []).append(node)
    width = max(map(len, rows.values())) * (WIDTH + GAP) + GAP
    place = {
        node: (int(width / 2 + (i - len(row) / 2) * (WIDTH + GAP) + GAP / 2), GAP + depth * (HEIGHT + GAP))
        for depth, row in rows.items()
        for i, node in enumerate(row)
    }
    order = {node: i for i, node in enumerate(level)}
    arrows = [
        (place[a][0] + WIDTH // 2, place[a][1] + HEIGHT, place[b][0] + WIDTH // 2, place[b][1])
        for a, b in sorted(links, key=lambda link: (order[link[0]], order[link[1]]))
    ]
    boxes = [{"x": x, "y": y, "label": _label(node), "shape": _shape(node)} for node, (x, y) in place.items()]
    return {"width": width, "height": GAP + (max(rows) + 1) * (HEIGHT + GAP), "boxes": boxes, "arrows": arrows}
