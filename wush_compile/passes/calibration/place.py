"""Moves a captured graph to another device: its constants, and the tensors that its nodes create."""

import torch
from torch import fx

aten = torch.ops.aten


def _count_floats(graph: fx.Graph, histogram: fx.Node) -> None:
    """Makes a histogram count floats: on other devices than a CPU, models count the tokens of experts as integers."""
    given = histogram.args[0]
    if given.target is aten.to.dtype and given.args[1].is_floating_point:
        return
    with graph.inserting_before(histogram):
        floats = graph.call_function(aten.to.dtype, (given, torch.float32))
    floats.meta = {key: value for key, value in histogram.meta.items() if key != "val"}
    histogram.replace_input_with(given, floats)


def place(graph_module: fx.GraphModule, device: torch.device, loaded: set[str]) -> None:
    """Makes the graph run on `device`. Leaves the attributes named in `loaded` alone: the caller provides them.

    Views become reshapes, because a device's kernels may return strides that do not allow a view.
    """
    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": device}
            if node.target is aten.to.device:
                node.args = (node.args[0], device, *node.args[2:])
            elif node.target is aten.view.default:
                node.target = aten.reshape.default
            elif node.target is aten.histc.default and device.type == "cpu":
                _count_floats(module.graph, node)
            elif node.target is torch.ops.higher_order.wrap_with_autocast:
                node.args = (device.type, *node.args[1:])
        module.recompile()
    for name, buffer in list(graph_module.named_buffers()):
        if name not in loaded:
            owner, _, leaf = name.rpartition(".")
            setattr(graph_module.get_submodule(owner), leaf, buffer.to(device))
