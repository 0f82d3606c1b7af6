"""Inserts and removes the calibration observers: one `wush::observe` node for each group of linears."""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ...ops import observe_cross as _observe_cross  # noqa: F401  (registers wush::observe_cross)
from ...ops import observe_experts as _observe_experts  # noqa: F401  (registers wush::observe_experts)
from ...solver.sensitivity import Sensitivity
from ...solver.solution import moment_shape
from .dataflow import depend_on
from .experts import products
from .group import LinearGroup

# Rows R that the sample of a group keeps.
GROUP_SAMPLE_ROWS = 2048


@dataclass
class Observation:
    """What an observer has seen.

    moment   fp32 Σ xxᵀ [K, K], or its diagonal blocks [K/B, B, B]; of experts [E, ..]
    count    int64 [], the number of rows; of experts [E]
    sample   some of the rows [R, K], in the input's dtype
    expert   fp32 [R, 1], the expert of each row of the sample's uniform part; None without experts
    pooled   float64, the mean moment of all experts' rows, once all of them are seen; None without experts
    sensitivity   what errors of the rows cost; None without gradients
    cross    fp32 [K, K], Σ x (x of the unquantized model − x)ᵀ; None where no weights are corrected
    """

    moment: Tensor
    count: Tensor
    sample: Tensor
    expert: Tensor | None = None
    pooled: Tensor | None = None
    sensitivity: Sensitivity | None = None
    cross: Tensor | None = None


wush = torch.ops.wush
# Each has the mask behind the rows.
LINEAR_OBSERVERS = (wush.observe.default, wush.observe_cross.default)
OBSERVERS = (*LINEAR_OBSERVERS, wush.observe_experts.default)
FIELDS = ("moment", "count", "sample", "expert", "cross")


def _buffers(graph_module: fx.GraphModule, index: int) -> dict[str, str]:
    """The names of an observer's buffers in a graph, by the fields of `Observation`."""
    names = {field: f"wush_observer_{index}_{field}" for field in FIELDS}
    return {field: name for field, name in names.items() if hasattr(graph_module, name)}


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
    mask_of, found = _masks(graph), products(graph)
    # Rows of a layer's experts are in one order in all its products. Only the first one copies tokens.
    copied = {product.offs: product for product in reversed(found.values()) if product.token is not None}
    for index, group in enumerate(groups):
        if group is None:
            continue
        node = group.linears[0].node
        each = () if group.experts is None else (group.experts,)
        state = {
            "moment": ((*each, *moment_shape(group.recipe, group.width)), torch.float32),
            "count": (each, torch.int64),
            "sample": ((GROUP_SAMPLE_ROWS, group.width), group.source.meta["val"].dtype),
            **({"expert": ((GROUP_SAMPLE_ROWS, 1), torch.float32)} if each else {}),
        }
        corrects = corrects_weights(group)
        own = list(state)
        if corrects:
            state["cross"] = ((group.width, group.width), torch.float32)
        for field, (shape, dtype) in state.items():
            name = f"wush_observer_{index}_{field}"
            graph_module.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        if each:
            offs = found[node].offs
            tokens = copied.get(offs)
            mask = None if tokens is None else mask_of(tokens.source)
            target = wush.observe_experts.default
            args = (group.source, offs, mask, None if mask is None else tokens.token)
        else:
            target, args = wush.observe.default, (group.source, mask_of(group.source))
        with graph.inserting_before(node):
            buffers = {field: graph.get_attr(name) for field, name in _buffers(graph_module, index).items()}
            made = [graph.call_function(target, (*args, *(buffers[f] for f in own), group.recipe.seed))]
            if corrects:
                graph_module.register_buffer(reference_name(index), torch.empty(0, device="meta"))
                reference = graph.get_attr(reference_name(index))
                made.append(graph.call_function(wush.observe_cross.default, (*args, reference, buffers["cross"])))
        for observer in made:
            observer.meta["wush_group"] = index
            observer.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    graph.lint()
    graph_module.recompile()


def observed(graph_module: fx.GraphModule) -> list[int]:
    """Returns the numbers of the groups that this graph observes, in graph order."""
    return list(dict.fromkeys(n.meta["wush_group"] for n in graph_module.graph.nodes if n.target in OBSERVERS))


def observers(graph_module: fx.GraphModule, groups: Container[int]) -> list[fx.Node]:
    """Returns the observers of these groups."""
    nodes = graph_module.graph.nodes
    return [node for node in nodes if node.target in OBSERVERS and node.meta["wush_group"] in groups]


def weigh_observers(graph_module: fx.GraphModule, weighted: Container[int]) -> None:
    """Gives the observers of these groups a weight for each row. `weight_name` names what the caller must provide."""
    for node in list(graph_module.graph.nodes):
        if node.target in LINEAR_OBSERVERS and (index := node.meta["wush_group"]) in weighted:
            name = weight_name(index)
            if not hasattr(graph_module, name):
                graph_module.register_buffer(name, torch.empty(0, device="meta"))
            with graph_module.graph.inserting_before(node):
                node.args = (*node.args, graph_module.graph.get_attr(name))
    graph_module.recompile()


def weight_name(index: int) -> str:
    """Returns the name of the tensor that weighs the rows of group `index`."""
    return f"wush_observer_{index}_weight"


def reference_name(index: int) -> str:
    """Returns the name of the tensor that is the input of group `index` in the unquantized model."""
    return f"wush_observer_{index}_reference"


def corrects_weights(group: LinearGroup) -> bool:
    """Whether the weights of this group make up for the groups in front of it.

    Not if its rows are chosen by the data: experts', and those that a mask selects. The unquantized model may choose
    others.
    """
    chosen = group.experts is not None or free_unbacked_symbols(group.source.meta["val"])
    return group.recipe.corrects_weights and not chosen


def allocate(graph_module: fx.GraphModule, index: int, device: torch.device) -> Observation:
    """Allocates zeroed buffers for the observer of group `index`. `remove_observers` frees them."""
    names = _buffers(graph_module, index)
    tensors = {field: torch.zeros_like(getattr(graph_module, name), device=device) for field, name in names.items()}
    for field, name in names.items():
        setattr(graph_module, name, tensors[field])
    return Observation(**tensors)


def share(graph_module: fx.GraphModule, index: int, observation: Observation) -> None:
    """Makes the observer of group `index` add to the buffers of another graph's observer."""
    for field, name in _buffers(graph_module, index).items():
        setattr(graph_module, name, getattr(observation, field))


def remove_observers(graph_module: fx.GraphModule, groups: Container[int] | None = None) -> None:
    """Removes the observers of these groups, or all, and their buffers from the graph."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target in OBSERVERS and (groups is None or node.meta["wush_group"] in groups):
            state = [a for a in node.all_input_nodes if a.op == "get_attr"]
            graph.erase_node(node)
            for attribute in state:
                if not attribute.users:
                    graph.erase_node(attribute)
                    if hasattr(graph_module, attribute.target):  # both observers of a group have its weights
                        delattr(graph_module, attribute.target)
    graph.lint()
    graph_module.recompile()
