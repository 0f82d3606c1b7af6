"""Finds the linears of a graph and groups those that read the same tensor. Groups follow dataflow, not names."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ...config import DEFAULT_IGNORE, WushConfig, ignored_by, matches
from ...errors import CaptureError, ConfigError, one_of
from ...recipe import Recipe
from .dataflow import depend_on
from .linears import called_from, nodes_by_module, parametrized_weights, restore_linears
from .partition import assign_stages

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """One linear that can be quantized.

    node        its node in the graph
    name        its module in the model
    weight      the name of its weight
    bias        the name of its bias, or None
    rows        output channels N
    transposed  whether the weight is stored as [K, N], as in GPT-2's Conv1D
    """

    node: fx.Node
    name: str
    weight: str
    bias: str | None
    rows: int
    transposed: bool


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a stage with the same input node and the same recipe, in graph order.

    They share one second moment, one transform and one packed buffer.

    source    the input node
    width     input channels K
    """

    source: fx.Node
    linears: tuple[Linear, ...]
    width: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The module name of the first member, which names the group everywhere."""
        return self.linears[0].name

    def stacked_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stacks the members' weights from `tensors`: [N, K]."""
        weights = (tensors[m.weight] for m in self.linears)
        return torch.cat([w.T if m.transposed else w for m, w in zip(self.linears, weights, strict=True)])

    def stacked_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Stacks the members' biases: [N], with zeros for a member without one. None if no member has a bias."""
        if all(m.bias is None for m in self.linears):
            return None
        like = tensors[self.linears[0].weight]
        return torch.cat([like.new_zeros(m.rows) if m.bias is None else tensors[m.bias] for m in self.linears])


def _check_patterns(model: nn.Module, config: WushConfig) -> None:
    """Raises `ConfigError` if a pattern matches no module. Patterns of the default `ignore` may match none."""
    names = [name for name, _ in model.named_modules() if name]
    for setting, patterns in (("ignore", config.ignore), ("overrides", config.overrides)):
        for pattern in patterns:
            plain = pattern.removeprefix("!") if setting == "ignore" else pattern
            if setting == "ignore" and plain in DEFAULT_IGNORE or any(matches(name, plain) for name in names):
                continue
            if any(c in plain for c in "*?["):
                raise ConfigError(f"{setting} pattern {pattern!r} matches no module of {type(model).__name__}")
            one_of(f"module in {setting}", plain, names)


def _check_overrides(config: WushConfig, linears: Iterable[Linear], skipped: Mapping[str, str]) -> None:
    """Raises `ConfigError` if an override matches no quantized linear, because it would have no effect."""
    quantized = [linear.name for linear in linears]
    for pattern in config.overrides:
        if not any(matches(name, pattern) for name in quantized):
            reason = next(
                (f": {name} is not quantized, {r}" for name, r in skipped.items() if matches(name, pattern)), ""
            )
            raise ConfigError(f"overrides[{pattern!r}] matches no linear that is quantized{reason}")


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


def encoders_beside_tokens(graph: fx.Graph) -> dict[fx.Node, str]:
    """Returns the nodes of encoders in front of a language model, each with the input that it encodes (`pixel_values`).

    Such a node depends on a floating-point input and on no token, and the model has linears that depend on both. So
    neither the text and the image side of CLIP is one, nor the encoder of an encoder-decoder.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    tokens = depend_on(graph, [n for n in inputs if n.target in ("input_ids", "inputs_embeds")])
    found: dict[fx.Node, str] = {}
    for node in inputs if tokens else ():
        value = node.meta.get("val")
        if node in tokens or not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in node.name:
            continue
        after = depend_on(graph, [node])
        weighted = (one for one in after & tokens if (given := operands(one)) and given[1].op == "get_attr")
        if next(weighted, None) is not None:
            found |= dict.fromkeys(after - tokens, node.name)
    return found


def find_again(
    graph_module: fx.GraphModule, model: nn.Module, groups: list[LinearGroup]
) -> list[LinearGroup | None]:
    """Returns the same groups in another graph of the model; None for a group that this graph does not reach.

    Raises `CaptureError` if the members of a group do not have one input there.
    """
    names = {linear.name for group in groups for linear in group.linears}
    restore_linears(graph_module, model, names.__contains__)
    by_weight: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        found = operands(node)
        if found is not None and found[1].op == "get_attr":
            by_weight.setdefault(found[1].target, []).append(node)
    again: list[LinearGroup | None] = []
    for group in groups:
        found = [by_weight.get(linear.weight, []) for linear in group.linears]
        nodes = [node for own in found for node in own]
        sources = {operands(node)[0] for node in nodes}
        if nodes and (any(len(own) != 1 for own in found) or len(sources) > 1):
            raise CaptureError(f"it reaches {group.name} in another way than the traced batch")
        linears = tuple(replace(linear, node=node) for linear, node in zip(group.linears, nodes))
        again.append(replace(group, source=sources.pop(), linears=linears) if nodes else None)
    return again


def _is_linear(module: nn.Module, transposed: bool, nodes: list[fx.Node]) -> bool:
    """Tells whether a module computes the product and nothing else.

    nodes   what the trace of its forward computes
    """
    if transposed:  # Conv1D of transformers, recognized without an import, because passes do not import transformers
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward or len(nodes) == 1)


def _asked_for(name: str, patterns: Iterable[str]) -> bool:
    """Tells whether the last pattern of `ignore` that matches a name begins with `!`."""
    found = [pattern for pattern in patterns if matches(name, pattern.removeprefix("!"))]
    return bool(found) and found[-1].startswith("!")


def _encodes(name: str, what: str) -> str:
    """Returns the reason for a linear in an encoder of another input than tokens."""
    parts = name.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    pattern = "!" + ".".join([*parts[:depth], "*"] if depth else parts)
    return f"encodes {what}, which stays in 16 bits by default: ignore=({pattern!r},) quantizes it"


def _computed(module: nn.Module) -> str:
    """Returns the reason for a linear whose weight is not a parameter."""
    return f"the weight of this {type(module).__name__} is computed in its forward or by a hook"


def find_groups(
    graph_module: fx.GraphModule, model: nn.Module, config: WushConfig
) -> tuple[list[LinearGroup], dict[str, str]]:
    """Returns the groups to quantize, in graph order, and `{name: reason}` of every other matrix of the model."""
    _check_patterns(model, config)
    restore_linears(graph_module, model, lambda name: not ignored_by(name, config.ignore))
    parameters = dict(model.named_parameters(remove_duplicate=False)) | parametrized_weights(model)
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    attributes = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target in parameters]
    uses = Counter(id(parameters[n.target]) for n in attributes for _ in n.users)

    stage_of, _ = assign_stages(graph_module.graph)  # layers that read the same tensor (cross-attention) share no group
    by_module = nodes_by_module(graph_module.graph)
    encoders = encoders_beside_tokens(graph_module.graph)
    skipped: dict[str, str] = {}
    by_source: dict[tuple, list[Linear]] = {}  # (.., recipe) -> linears
    done: set[int] = set()
    for node in graph_module.graph.nodes:
        found = operands(node)
        if found is None:
            continue
        if found[1].op != "get_attr" or found[1].target not in parameters:
            module = model.get_submodule(called_from(node))
            if isinstance(module, nn.Linear):
                skipped[called_from(node)] = _computed(module)
                done |= {id(parameter) for parameter in module.parameters()}
            continue
        source, weight, bias, transposed = found
        parameter = parameters[weight.target]
        aliases = names_of[id(parameter)]
        caller = called_from(node)
        owned = next((a for a in aliases if a.rpartition(".")[0] == caller), weight.target)
        name = owned.rpartition(".")[0]
        module = model.get_submodule(name)
        width = parameter.shape[0 if transposed else 1] if parameter.dim() == 2 else 0
        bias_name = bias.target if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
        if pattern := ignored_by(name, config.ignore):
            reason = f"ignored by the configuration ({pattern!r})"
        elif node in encoders and not _asked_for(name, config.ignore):
            reason = _encodes(name, encoders[node])
        elif len(aliases) > 1:
            other = next((a for a in aliases if a != owned), owned).rpartition(".")[0]
            reason = f"weight is tied to {other}"
        elif not _is_linear(module, transposed, by_module.get(name, [])):
            linear = isinstance(module, nn.Linear)
            other = "whose forward computes more than the product" if linear else "not to a linear layer"
            reason = f"belongs to {type(module).__name__}, {other}"
        elif caller != name:
            reason = f"used by {caller or type(model).__name__} directly, not through its own forward"
        elif uses[id(parameter)] > 1:
            reason = f"applied {uses[id(parameter)]} times in one forward"
        elif bias is not None and bias_name is None:
            reason = "its bias is computed in the graph"
        elif width % (recipe := config.recipe_of(name)).group_size:
            reason = f"width {width} is not a multiple of {recipe.format}'s group of {recipe.group_size}"
        else:
            key = (source, stage_of[node], recipe) if recipe.share_transform else (node, recipe)
            rows = parameter.shape[1 if transposed else 0]
            by_source.setdefault(key, []).append(Linear(node, name, owned, bias_name, rows, transposed))
            done |= {id(parameter), *map(id, module.parameters())}
            continue
        skipped[name] = reason
        done.add(id(parameter))

    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in done:
            continue
        owner_name, _, leaf = parameter_name.rpartition(".")
        owner = type(model.get_submodule(owner_name)).__name__
        if not uses[id(parameter)]:
            reason = "not reached by the traced forward"
        elif parameter.dim() == 3:
            reason = f"3-D weight of {owner}: MoE experts are not supported"
        else:
            reason = f"belongs to {owner}, not to a linear layer"
        skipped[owner_name if leaf == "weight" and owner_name else parameter_name] = reason

    groups = []
    for (*_, recipe), linears in by_source.items():
        source, weight, _, transposed = operands(linears[0].node)
        shape = parameters[weight.target].shape
        groups.append(LinearGroup(source, tuple(linears), shape[0 if transposed else 1], recipe))
    _check_overrides(config, (linear for group in groups for linear in group.linears), skipped)
    return groups, skipped
