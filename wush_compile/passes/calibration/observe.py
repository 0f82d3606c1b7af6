"""Inserts and removes the calibration observers: one `wush::observe` node for each group of linears."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ...solver.solution import moment_shape
from .dataflow import depend_on
from .group import LinearGroup

# Rows R that the sample of a group keeps.
GROUP_SAMPLE_ROWS = 2048


@dataclass
class Observation:
    """What an observer has seen.

    moment   fp32 Σ xxᵀ [K, K], or its diagonal blocks [K/B, B, B]
    count    int64 [], the number of rows
    sample   some of the rows [R, K], in the input's dtype
    """

    moment: Tensor
    count: Tensor
    sample: Tensor


def _buffers(index: int) -> dict[str, str]:
    return {field: f"wush_observer_{index}_{field}" for field in ("moment", "count", "sample")}


def _traced_size(sizes: torch.Size) -> int:
    """Returns the product of sizes, with symbolic sizes as in the example input."""
    return math.prod(s if isinstance(s, int) else s.node.hint for s in sizes)


def _covers(mask: fx.Node, source: fx.Node) -> bool:
    """Tells whether the mask has one entry for each row of the observed tensor. A pooler's input has fewer rows.

    It compares the sizes in the example: the symbols of a mask and of the tokens differ, since a mask may be broadcast.
    """
    return _traced_size(source.meta["val"].shape[:-1]) == _traced_size(mask.meta["val"].shape)


def _masks(graph: fx.Graph) -> Callable[[fx.Node], fx.Node | None]:
    """Returns a function that gives the attention mask for the rows of a node, or None.

    In an encoder-decoder, what depends on the decoder's inputs has the decoder's mask.
    """
    inputs = {n.target: n for n in graph.nodes if n.op == "placeholder"}
    after = depend_on(graph, [n for name, n in inputs.items() if name.startswith("decoder_")])

    def mask_of(source: fx.Node) -> fx.Node | None:
        mask = inputs.get("decoder_attention_mask" if source in after else "attention_mask")
        return mask if mask is not None and _covers(mask, source) else None

    return mask_of


def insert_observers(graph_module: fx.GraphModule, groups: list[LinearGroup | None]) -> None:
    """Puts an observer before the first member of every group. It leaves out the rows that the attention mask excludes.

    The observers' buffers are on the meta device until `allocate`, so that only one stage's moments are in memory.
    """
    graph = graph_module.graph
    mask_of = _masks(graph)
    for index, group in enumerate(groups):
        if group is None:
            continue
        names = _buffers(index)
        shapes = (moment_shape(group.recipe, group.width), (), (GROUP_SAMPLE_ROWS, group.width))
        dtypes = (torch.float32, torch.int64, group.source.meta["val"].dtype)
        for name, shape, dtype in zip(names.values(), shapes, dtypes, strict=True):
            graph_module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        with graph.inserting_before(group.linears[0].node):
            state = [graph.get_attr(name) for name in names.values()]
            node = graph.call_function(
                torch.ops.wush.observe.default, (group.source, mask_of(group.source), *state, group.recipe.seed)
            )
        node.meta["wush_group"] = index
        node.meta["nn_module_stack"] = group.linears[0].node.meta.get("nn_module_stack")
    graph.lint()
    graph_module.recompile()


def observed(graph_module: fx.GraphModule) -> list[int]:
    """Returns the numbers of the groups that this graph observes, in graph order."""
    return [n.meta["wush_group"] for n in graph_module.graph.nodes if n.target is torch.ops.wush.observe.default]


def allocate(graph_module: fx.GraphModule, index: int, device: torch.device) -> Observation:
    """Allocates zeroed buffers for the observer of group `index`. `remove_observers` frees them."""
    tensors = []
    for name in _buffers(index).values():
        tensors.append(torch.zeros_like(getattr(graph_module, name), device=device))
        setattr(graph_module, name, tensors[-1])
    return Observation(*tensors)


def share(graph_module: fx.GraphModule, index: int, observation: Observation) -> None:
    """Makes the observer of group `index` add to the buffers of another graph's observer."""
    for name, tensor in zip(_buffers(index).values(), vars(observation).values(), strict=True):
        setattr(graph_module, name, tensor)


def remove_observers(graph_module: fx.GraphModule) -> None:
    """Removes every observer and its buffers from the graph."""
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
