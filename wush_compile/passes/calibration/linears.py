"""Makes linears of what a trace took apart: subclasses of `nn.Linear` with a forward of their own, parametrized ones.

Falcon's linear computes `x @ weight.T + bias`. A parametrized linear computes its weight from other parameters. Both
become one `aten.linear` node whose weight is a `get_attr` node.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .skipped import called_by

aten = torch.ops.aten
# Ops that transpose a matrix, and the arguments that they then have.
TRANSPOSES = {
    aten.numpy_T.default: [()],
    aten.t.default: [()],
    aten.mT.default: [()],
    aten.transpose.int: [(0, 1), (1, 0), (-1, -2), (-2, -1)],
    aten.permute.default: [([1, 0],)],
}
PRODUCTS = (aten.matmul.default, aten.mm.default)


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Returns (input, weight, bias, transposed) of a linear node; None for any other node."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        return node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None, False
    if node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
        return node.args[1], node.args[2], node.args[0], True
    if node.target is aten.mm.default:
        return node.args[0], node.args[1], None, True
    return None


def nodes_by_module(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Returns the computing nodes of each innermost module."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found.setdefault(called_by(node)[0], []).append(node)
    return found


def parametrized_weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of parametrized linears by name."""
    return {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight")
    }


def restore_linears(graph_module: fx.GraphModule, model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Makes one node of every linear that a trace took apart, if its module's name is wanted."""
    by_module = nodes_by_module(graph_module.graph)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in by_module and wanted(name):
            if parametrize.is_parametrized(module, "weight"):
                _keep_weight(graph_module, name, module)
            elif type(module).forward is not nn.Linear.forward:
                _join(graph_module.graph, name, by_module[name])
    graph_module.graph.lint()
    graph_module.recompile()


def _join(graph: fx.Graph, name: str, nodes: list[fx.Node]) -> None:
    """Replaces `x @ weight.T` or `x @ weight.T + bias` by a linear if the module computes nothing else."""
    if len(nodes) not in (2, 3):
        return
    transpose, product, *add = nodes
    weight, bias = transpose.all_input_nodes[0] if transpose.all_input_nodes else None, None
    if transpose.args[1:] not in TRANSPOSES.get(transpose.target, []) or product.target not in PRODUCTS:
        return
    if weight.op != "get_attr" or weight.target != f"{name}.weight" or product.args[1] is not transpose:
        return
    if add:
        if add[0].target is not aten.add.Tensor or add[0].kwargs or list(product.users) != add:
            return
        bias = next((n for n in add[0].args if n is not product), None)
        if getattr(bias, "op", None) != "get_attr" or bias.target != f"{name}.bias":
            return
    last = nodes[-1]
    with graph.inserting_before(last):
        linear = graph.call_function(aten.linear.default, (product.args[0], weight, bias))
    linear.meta = dict(last.meta)
    last.replace_all_uses_with(linear)
    for node in reversed(nodes):
        graph.erase_node(node)


def _keep_weight(graph_module: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Makes the weight of a parametrized linear a `get_attr` node, whose value `ModelTensors` computes."""
    graph, path = graph_module.graph, f"{name}.weight"
    linears = [n for n in graph.nodes if n.target is aten.linear.default and called_by(n)[0] == name]
    if not linears or any(n.args[1].op == "get_attr" for n in linears):
        return
    graph_module.get_submodule(name).register_buffer("weight", module.weight.detach().to("meta"))
    for node in linears:
        computed = node.args[1]
        with graph.inserting_before(node):
            weight = graph.get_attr(path)
        weight.meta = dict(computed.meta)
        node.replace_input_with(computed, weight)
        erase_unused(graph, computed)


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erases a node that nothing reads but assertions about it, and then what only it read. Inputs stay."""
    readers = [user for user in node.users if not str(user.target).startswith("aten._assert")]
    if readers or node.op == "placeholder" or node._erased:
        return
    inputs = node.all_input_nodes
    for assertion in list(node.users):
        graph.erase_node(assertion)
    graph.erase_node(node)
    for used in inputs:
        erase_unused(graph, used)
