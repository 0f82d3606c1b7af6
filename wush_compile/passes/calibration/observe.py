"""Inserts and removes the calibration observers: one `wush::observe` node for each group of linears."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...solver.solution import moment_shape
from .group import LinearGroup

SAMPLE_ROWS = 2048


@dataclass
class Observation:
    """What an observer has seen: Σ xxᵀ [K, K] or its diagonal blocks [K/B, B, B], the row count, kept rows [R, K]."""

    moment: Tensor
    count: Tensor
    sample: Tensor


def _buffers(index: int) -> dict[str, str]:
    return {field: f"wush_observer_{index}_{field}" for field in ("moment", "count", "sample")}


def _traced_size(sizes: torch.Size) -> int:
    """Product of sizes, symbols standing for what they were in the example the graph was traced on."""
    return math.prod(s if isinstance(s, int) else s.node.hint for s in sizes)


def _covers(mask: fx.Node, source: fx.Node) -> bool:
    """Whether the mask has one entry for each row of the observed tensor (a pooler's input has fewer rows).

    Symbols cannot tell: those of a mask and of the tokens differ, since a mask may be broadcast.
    """
    return _traced_size(source.meta["val"].shape[:-1]) == _traced_size(mask.meta["val"].shape)


def insert_observers(graph_module: fx.GraphModule, groups: list[LinearGroup], mask: fx.Node | None = None) -> None:
    """Puts an observer before the first member of every group. `mask` is the placeholder of the attention mask.

    The observers' buffers stay on the meta device until `allocate`, so that only one stage's moments are ever in memory.
    """
    graph = graph_module.graph
    for index, group in enumerate(groups):
        names = _buffers(index)
        shapes = (moment_shape(group.recipe, group.width), (), (SAMPLE_ROWS, group.width))
        dtypes = (torch.float32, torch.int64, group.source.meta["val"].dtype)
        for name, shape, dtype in zip(names.values(), shapes, dtypes, strict=True):
            graph_module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        with graph.inserting_before(group.linears[0].node):
            state = [graph.get_attr(name) for name in names.values()]
            applies = mask if mask is not None and _covers(mask, group.source) else None
            node = graph.call_function(
                torch.ops.wush.observe.default, (group.source, applies, *state, group.recipe.seed)
            )
        node.meta["wush_group"] = index
        node.meta["nn_module_stack"] = group.linears[0].node.meta.get("nn_module_stack")
    graph.lint()
    graph_module.recompile()


def observed(graph_module: fx.GraphModule) -> list[int]:
    """Numbers of the groups that this graph observes, in graph order."""
    return [n.meta["wush_group"] for n in graph_module.graph.nodes if n.target is torch.ops.wush.observe.default]


def allocate(graph_module: fx.GraphModule, index: int, device: torch.device) -> Observation:
    """Zeroed buffers for the observer of group `index`; they are freed by `remove_observers`."""
    tensors = []
    for name in _buffers(index).values():
        tensors.append(torch.zeros_like(getattr(graph_module, name), device=device))
        setattr(graph_module, name, tensors[-1])
    return Observation(*tensors)


def remove_observers(graph_module: fx.GraphModule) -> None:
    """Takes every observer and its buffers out of the graph."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.wush.observe.default:
            state = [a for a in node.all_input_nodes if a.op == "get_attr"]
            graph.erase_node(node)
            for attribute in state:
                if not attribute.users:
                    graph.erase_node(attribute)
                    delattr(graph_module, attribute.target)
    graph.lint()
    graph_module.recompile()
