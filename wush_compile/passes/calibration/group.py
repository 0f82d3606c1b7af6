"""Finds the linears of a graph and groups those that read the same tensor. Groups follow dataflow, not names.

A product of the experts of a layer is a group of its own.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ...config import DEFAULT_IGNORE, HEAD, Names, WushConfig, matches
from ...errors import CaptureError, ConfigError, one_of
from ...recipe import Recipe
from .dataflow import written_by
from .encoders import asked_for, encoders_beside_tokens, encodes
from .experts import ROUTER, Product, cannot_replace, left_in_16_bits, product_of, products, routers
from .linears import nodes_by_module, operands, parametrized_weights, restore_linears
from .partition import assign_stages
from .skipped import (
    belongs_to,
    called_by,
    is_linear_layer,
    other_dtype,
    own_product,
    read_by,
    readers_of,
    reason_to_skip,
)
from .tied import embeddings_of, lookups

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """One linear that can be quantized, or one product of all experts of a layer.

    node        its node in the graph, the last one of a product
    name        its module in the model; of a product its weight
    weight      the name of its weight
    bias        the name of its bias, or None
    rows        output channels N, of one expert
    transposed  whether the weight is stored as [K, N], as in GPT-2's Conv1D
    experts     how many experts a product has; None for a linear
    embeddings  the modules that look up rows of the weight, which they share
    """

    node: fx.Node
    name: str
    weight: str
    bias: str | None
    rows: int
    transposed: bool
    experts: int | None = None
    embeddings: tuple[str, ...] = ()

    @property
    def names(self) -> Names:
        """The names that patterns are matched with."""
        return self.name if self.experts is None else (self.name, self.name.rpartition(".")[0])


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a stage with the same input node and the same recipe, in graph order; or one product of experts.

    They share one second moment, one transform and one packed buffer.

    source    the input node; of a product its rows in the order of experts
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

    @property
    def experts(self) -> int | None:
        """How many experts a product of experts has; None for a group of linears."""
        return self.linears[0].experts

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The modules that look up rows of the weight of a tied head, which is a group of its own."""
        return self.linears[0].embeddings

    def stacked_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stacks the members' weights from `tensors`: [N, K]. Of a product of experts: [E, N, K]."""
        if self.experts is not None:
            weight = tensors[self.linears[0].weight]
            return weight.mT if self.linears[0].transposed else weight
        weights = (tensors[m.weight] for m in self.linears)
        return torch.cat([w.T if m.transposed else w for m, w in zip(self.linears, weights, strict=True)])

    def stacked_bias(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Stacks the members' biases: [N], with zeros for a member without one. None if no member has a bias.

        Of a product of experts: [E, N].
        """
        if all(m.bias is None for m in self.linears):
            return None
        if self.experts is not None:
            return tensors[self.linears[0].bias]
        like = tensors[self.linears[0].weight]
        return torch.cat([like.new_zeros(m.rows) if m.bias is None else tensors[m.bias] for m in self.linears])


def _check_patterns(model: nn.Module, config: WushConfig) -> None:
    """Raises `ConfigError` if a pattern matches no module. Patterns of the default `ignore` may match none."""
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, parameter in model.named_parameters() if parameter.dim() == 3]  # experts
    if config.head is not None and not any(matches(name, HEAD) for name in names):
        raise ConfigError(
            f"head={config.head!r} is for a module named {HEAD}, which {type(model).__name__} does not have: give "
            f"overrides={{NAME: {{'format': {config.head!r}, 'activation_format': None}}}} with the name of its head"
        )
    for setting, patterns in (("ignore", config.ignore), ("overrides", dict(config.changes))):
        for pattern in patterns:
            plain = pattern.removeprefix("!") if setting == "ignore" else pattern
            if setting == "ignore" and plain in DEFAULT_IGNORE or any(matches(name, plain) for name in names):
                continue
            if any(c in plain for c in "*?["):
                raise ConfigError(f"{setting} pattern {pattern!r} matches no module of {type(model).__name__}")
            one_of(f"module in {setting}", plain, names)


def _check_overrides(config: WushConfig, linears: Iterable[Linear], skipped: Mapping[str, str]) -> None:
    """Raises `ConfigError` if an override matches no quantized linear, because it would have no effect."""
    quantized = [linear.names for linear in linears]
    for pattern in dict(config.changes):
        if not any(matches(name, pattern) for name in quantized):
            reason = next(
                (
                    f": {name} is not quantized, {r}"
                    for name, r in skipped.items()
                    if matches((name, name.rpartition(".")[0]), pattern)
                ),
                "",
            )
            raise ConfigError(f"overrides[{pattern!r}] matches no linear that is quantized{reason}")


def find_again(graph_module: fx.GraphModule, model: nn.Module, groups: list[LinearGroup]) -> list[LinearGroup | None]:
    """Returns the same groups in another graph of the model; None for a group that this graph does not reach.

    Raises `CaptureError` if the members of a group do not have one input there.
    """
    names = {linear.name for group in groups for linear in group.linears}
    restore_linears(graph_module, model, names.__contains__)
    by_weight: dict[str, list[fx.Node]] = {}
    source_of: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if (product := product_of(node)) is not None:
            last, own = product
            by_weight.setdefault(own.weight.target, []).append(last)
            source_of[last] = own.rows
            continue
        found = operands(node)
        if found is not None and found[1].op == "get_attr":
            by_weight.setdefault(found[1].target, []).append(node)
            source_of[node] = found[0]
    again: list[LinearGroup | None] = []
    for group in groups:
        found = [by_weight.get(linear.weight, []) for linear in group.linears]
        nodes = [node for own in found for node in own]
        sources = {source_of[node] for node in nodes}
        if nodes and (any(len(own) != 1 for own in found) or len(sources) > 1):
            raise CaptureError(f"it reaches {group.name} in another way than the traced batch")
        linears = tuple(replace(linear, node=node) for linear, node in zip(group.linears, nodes))
        again.append(replace(group, source=sources.pop(), linears=linears) if nodes else None)
    return again


def _products(
    graph: fx.Graph, model: nn.Module, config: WushConfig, found: Mapping[fx.Node, Product], uses: Mapping[str, int]
) -> dict[fx.Node, Linear | str]:
    """For the last node of each product of experts: what to quantize, or why it is not quantized.

    The module of experts is replaced as a whole: a product stays as it is if the module's other one does.
    """
    plans: dict[fx.Node, Linear | str] = {}
    encoders = encoders_beside_tokens(graph)
    for last, product in found.items():
        name, shape = product.weight.target, product.weight.meta["val"].shape
        bias = None if product.bias is None else product.bias.target
        experts, rows, width = (shape[0], shape[2], shape[1]) if product.transposed else shape
        linear = Linear(last, name, name, bias, rows, product.transposed, experts)
        recipe = config.recipe_of(linear.names)
        if pattern := config.ignores(linear.names):
            plans[last] = f"ignored by the configuration ({pattern!r})"
        elif last in encoders and not asked_for(linear.names, config.ignore):
            plans[last] = encodes(name, encoders[last])
        elif reason := cannot_replace(name, called_by(last)[0], product, model, uses) or other_dtype(
            product.weight.meta["val"]
        ):
            plans[last] = reason
        elif width % recipe.group_size:
            plans[last] = f"width {width} is not a multiple of {recipe.format}'s group of {recipe.group_size}"
        else:
            plans[last] = linear
    left = {product.weight.target: plans[last] for last, product in found.items() if isinstance(plans[last], str)}
    for last, plan in plans.items():
        path = plan.name.rpartition(".")[0] if isinstance(plan, Linear) else ""
        other = next((name for name in left if path and name.rpartition(".")[0] == path), None)
        if other is not None:
            plans[last] = f"{other.rpartition('.')[2]} of the same experts is not quantized: {left[other]}"
    return plans


def _check_writes(graph: fx.Graph, model: nn.Module) -> None:
    """Raises `CaptureError` if the forward writes into a parameter, which every run of a batch would change again."""
    names = dict(model.named_parameters(remove_duplicate=False))
    for node in graph.nodes:
        for into in written_by(node):
            if into.op == "get_attr" and into.target in names:
                raise CaptureError(
                    f"the forward of {type(model).__name__} changes its own weight {into.target} ({node.target}), so "
                    "calibration would change it with every batch: switch that off in the model's configuration before "
                    "its first forward (RWKV: config.rescale_every = 0)"
                )


def find_groups(
    graph_module: fx.GraphModule, model: nn.Module, config: WushConfig
) -> tuple[list[LinearGroup], dict[str, str]]:
    """Returns the groups to quantize, in graph order, and `{name: reason}` of every other matrix of the model.

    Raises `CaptureError` for a model whose forward writes into its parameters.
    """
    _check_patterns(model, config)
    _check_writes(graph_module.graph, model)
    restore_linears(graph_module, model, lambda name: not config.ignores(name))
    parameters = dict(model.named_parameters(remove_duplicate=False)) | parametrized_weights(model)
    names_of: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    attributes = [n for n in graph_module.graph.nodes if n.op == "get_attr" and n.target in parameters]
    uses = Counter(id(parameters[n.target]) for n in attributes for _ in n.users)
    readers: dict[int, list[fx.Node]] = {}
    for node in attributes:
        readers.setdefault(id(parameters[node.target]), []).extend(readers_of(node))

    stage_of, _ = assign_stages(graph_module.graph)  # layers that read the same tensor (cross-attention) share no group
    by_module = nodes_by_module(graph_module.graph)
    encoders = encoders_beside_tokens(graph_module.graph)
    expert_products = products(graph_module.graph)
    routing = routers(expert_products.values())
    used = {n.target: uses[id(parameters[n.target])] for n in attributes}
    plans = _products(graph_module.graph, model, config, expert_products, used)
    expert_modules = {product.weight.target.rpartition(".")[0] for product in expert_products.values()}
    skipped: dict[str, str] = {}
    by_source: dict[tuple, list[Linear]] = {}
    recipe_of: dict[tuple, Recipe] = {}  # by the same keys
    done: set[int] = set()
    writes: Counter[fx.Node] = Counter()  # so far: what is overwritten in between is another tensor
    for node in graph_module.graph.nodes:
        writes.update(written_by(node))
        if node in plans:
            weight = expert_products[node].weight.target
            done.add(id(parameters[weight]))
            if isinstance(plan := plans[node], str):
                skipped[weight] = plan
            else:
                by_source[node,], recipe_of[node,] = [plan], config.recipe_of(plan.names)
                done.add(id(parameters.get(plan.bias)))
            continue
        found = operands(node)
        if found is None:
            continue
        if found[1].op != "get_attr" or found[1].target not in parameters:
            caller, _ = called_by(node)
            module = model.get_submodule(caller)
            if isinstance(module, nn.Linear):
                skipped[caller] = "its weight is computed in its forward or by a hook"
                done |= {id(parameter) for parameter in module.parameters()}
            continue
        source, weight, bias, transposed = found
        parameter = parameters[weight.target]
        aliases = names_of[id(parameter)]
        caller, caller_kind = called_by(node)
        owned = next((a for a in aliases if a.rpartition(".")[0] == caller), weight.target)
        name = owned.rpartition(".")[0]
        module = model.get_submodule(name)
        width = parameter.shape[0 if transposed else 1] if parameter.dim() == 2 else 0
        bias_name = bias.target if isinstance(bias, fx.Node) and bias.op == "get_attr" else None
        others = [alias for alias in aliases if alias != owned]
        embeddings = embeddings_of(model, config, name, others) if others else None
        if pattern := config.ignores(name):
            reason = f"ignored by the configuration ({pattern!r})"
        elif (reason := left_in_16_bits(node, name, len(parameter), routing, expert_modules)) and not asked_for(
            name, config.ignore
        ):
            pass
        elif node in encoders and not asked_for(name, config.ignore):
            reason = encodes(name, encoders[node])
        elif len(aliases) > 1 and embeddings is None:
            reason = f"weight is tied to {others[0].rpartition('.')[0]}"
        elif not is_linear_layer(module):
            reason = belongs_to(module)
        elif caller != name:
            reason = read_by(caller_kind or type(model).__name__)
        elif not own_product(module, transposed, by_module.get(name, [])):
            reason = f"{type(module).__name__} has a forward of its own"
        elif (applied := uses[id(parameter)] - (lookups(readers[id(parameter)]) if len(aliases) > 1 else 0)) > 1:
            reason = f"applied {applied} times in one forward"
        elif bias is not None and bias_name is None:
            reason = "its bias is computed in the graph"
        elif reason := other_dtype(parameter):
            pass
        elif width % (recipe := config.recipe_of(name)).group_size:
            reason = f"width {width} is not a multiple of {recipe.format}'s group of {recipe.group_size}"
        else:
            tied = len(aliases) > 1
            shared = recipe.share_transform and not tied
            key = (source, writes[source], stage_of[node], recipe.effective) if shared else (node,)
            recipe_of.setdefault(key, recipe)
            rows = parameter.shape[1 if transposed else 0]
            # The graph may fetch a tied weight by its other name.
            own = weight.target if tied else owned
            linear = Linear(node, name, own, bias_name, rows, transposed, embeddings=embeddings or ())
            by_source.setdefault(key, []).append(linear)
            done |= {id(parameter), *map(id, module.parameters())}
            kept = [other for other in others if other.rpartition(".")[0] not in linear.embeddings]
            for other in kept:  # its embedding reads it in another way
                skipped[other.rpartition(".")[0]] = "an embedding, which keeps its own copy of the head's weight"
            continue
        skipped[name if owned == f"{name}.weight" else owned] = reason
        done.add(id(parameter))

    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in done:
            continue
        owner, _, leaf = parameter_name.rpartition(".")
        read_by_nodes = readers.get(id(parameter), [])
        reason = reason_to_skip(parameter, model.get_submodule(owner), read_by_nodes)
        if not routing.isdisjoint(read_by_nodes):
            reason = ROUTER
        skipped[owner if leaf == "weight" and owner else parameter_name] = reason

    groups = []
    for key, linears in by_source.items():
        first = linears[0]
        source = operands(first.node)[0] if first.experts is None else expert_products[first.node].rows
        width = parameters[first.weight].shape[-2 if first.transposed else -1]
        groups.append(LinearGroup(source, tuple(linears), width, recipe_of[key]))
    _check_overrides(config, (linear for group in groups for linear in group.linears), skipped)
    return groups, skipped
