"""Traces one of several identical layers and copies its graph, because tracing time grows with the number of layers.

1. Trace. The first layer of a kind runs between the ops `wush::enter` and `wush::leave`. Every later layer with the
   same structure that gets the same kind of arguments becomes a single node, `wush::again`.
2. Verify. The layers of a kind run on the meta device at two sizes of the inputs. They must call the same ops with the
   same arguments in the same order. Layers that do not are a kind of their own, and the model is traced once more.
   Layers that cannot be compared make the model be traced as a whole.
3. Expand. A copy of the nodes between `enter` and `leave`, with the layer's own weights, replaces each `again`.

The model's own forward runs around the layers. So the graph holds what the model passes to each layer, such as masks
that alternate from layer to layer.
"""

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch._export.utils import _compiling_state_context
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .meta import meta_copy

log = logging.getLogger("wush_compile")
# With fewer layers, tracing all of them takes no longer.
MIN_LAYERS = 4
PLAIN_TYPES = (type(None), bool, int, float, str, torch.dtype, torch.device)
SYMBOLIC_TYPES = (torch.SymInt, torch.SymFloat, torch.SymBool)

lib = torch.library.Library("wush", "FRAGMENT")
lib.define("enter(Tensor[] xs) -> Tensor[]")
lib.define("leave(Tensor[] xs) -> Tensor[]")
lib.define("again(Tensor[] xs, int kind) -> Tensor[]")


class LayersDiffer(Exception):
    """One layer cannot stand for the others of its kind."""


def _like(xs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in xs]


@dataclass
class Kind:
    """Layers that get the same kind of arguments.

    name      the traced layer
    inputs    its arguments: the leaves and their tree
    outputs   the tensors that it returns
    assemble  puts such tensors into the tree that it returns
    others    the layers that `wush::again` stands for, in the order of their calls
    """

    name: str
    inputs: tuple[list, pytree.TreeSpec]
    outputs: list[Tensor] = field(default_factory=list)
    assemble: Callable[[list[Tensor]], object] | None = None
    others: list[str] = field(default_factory=list)


_kinds: list[Kind] = []
torch.library.register_fake("wush::enter", _like, lib=lib)
torch.library.register_fake("wush::leave", _like, lib=lib)
torch.library.register_fake("wush::again", lambda xs, kind: _like(_kinds[kind].outputs), lib=lib)


def export_by_layers(model: nn.Module, export: Callable[[], torch.export.ExportedProgram]) -> fx.GraphModule | None:
    """Calls `export` with one layer of each kind traced. Returns None where this is not possible.

    The caller then traces the whole model. That trace reports any real error.
    """
    layers = find_repeated_layers(model)
    if not layers:
        return None
    try:
        meta = meta_copy(model)  # copied before the layers' forwards are replaced
        kind_of = {name: structure(layer) for name, layer in layers.items()}
        for _ in range(2):
            with mark_calls(layers, kind_of) as kinds:
                program = export()
            ops = verify(kinds, meta)
            if all(ops[name] == ops[kind.name] for kind in kinds for name in kind.others):
                break
            kind_of = {name: (*kind, ops.get(name)) for name, kind in kind_of.items()}
        else:
            raise LayersDiffer("layers run other ops in a second trace")
        graph_module = program.module()
        expand_repeats(graph_module, kinds)
    except Exception as error:
        log.debug("traced as a whole: %s: %s", type(error).__name__, error)
        return None
    return graph_module


# -- trace -----------------------------------------------------------------------------------------------------------


def find_repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns, by name, the layers of every `ModuleList` of at least `MIN_LAYERS` modules, some of one structure.

    Lists inside these layers do not count. The result is empty if a layer occurs twice or shares weights with
    another. It is empty, too, if a module inside a layer has hooks, because the effect of a hook cannot be verified.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= MIN_LAYERS:
            repeated = len(set(map(structure, module))) < len(module)
            if repeated and not name.startswith(tuple(f"{other}." for other in found)):
                found |= {f"{name}.{i}": layer for i, layer in enumerate(module)}
    owners: dict[int, int] = {}
    for layer in found.values():
        for tensor in {id(t) for t in (*layer.parameters(), *layer.buffers())} | {id(layer)}:
            owners[tensor] = owners.get(tensor, 0) + 1
    alone = all(count == 1 for count in owners.values())
    return found if alone and not has_inner_hooks(found) else {}


def structure(layer: nn.Module) -> tuple:
    """Returns the names and classes of a layer's modules, and the shapes and dtypes of its tensors."""
    return (
        tuple((name, type(module)) for name, module in layer.named_modules()),
        tuple((name, t.shape, t.dtype) for name, t in (*layer.named_parameters(), *layer.named_buffers())),
    )


def has_inner_hooks(layers: dict[str, nn.Module]) -> bool:
    """Tells whether a module inside the layers has a forward hook. A layer's own hooks run at each of its calls."""
    inner = (module for layer in layers.values() for module in layer.modules() if module is not layer)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def _signature(leaf: object) -> tuple:
    if isinstance(leaf, Tensor):
        return str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype, leaf.device
    return type(leaf), leaf


def _assembler(leaves: list, spec: pytree.TreeSpec) -> Callable[[list[Tensor]], object]:
    """Returns a function from tensors to the tree with these tensors and with the other leaves as in `leaves`."""

    def assemble(tensors: list[Tensor]) -> object:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return assemble


def _tensors(leaves: list) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _state(layer: nn.Module) -> dict[tuple[int, str], object]:
    """Returns every attribute of every module in a layer."""
    return {(i, key): value for i, module in enumerate(layer.modules()) for key, value in vars(module).items()}


def _same(one: dict | list, other: dict | list) -> bool:
    """Tells whether both hold the same objects under the same keys."""
    one, other = (dict(enumerate(x)) if isinstance(x, list) else x for x in (one, other))
    return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())


def _is_simple(value: object) -> bool:
    """Tells whether a value holds only tensors and plain values, in tuples, lists and dicts.

    A layer could change any other object without a trace of this in the graph.
    """
    if type(value) in (tuple, list):
        return all(map(_is_simple, value))
    return all(map(_is_simple, value.values())) if type(value) is dict else isinstance(value, (Tensor, *PLAIN_TYPES))


def _each_once(tensors: list[Tensor]) -> bool:
    return bool(tensors) and len({id(t) for t in tensors}) == len(tensors)


def _marked_call(
    layer: nn.Module,
    forward: Callable,
    name: str,
    kind_of: dict[str, tuple],
    kinds: dict[tuple, int],
    args: tuple,
    kwargs: dict,
) -> object:
    """Calls a layer: the first of its kind between `enter` and `leave`, a later one as `again`.

    kind_of   what tells layers apart, by name
    kinds     that and the kind of arguments -> index in `_kinds`
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not _is_simple((args, kwargs)) or not _each_once(_tensors(leaves)):
        return forward(*args, **kwargs)
    key = (name.rpartition(".")[0], kind_of[name], str(spec), *map(_signature, leaves))
    if key in kinds:
        kind = _kinds[kinds[key]]
        kind.others.append(name)
        return kind.assemble(torch.ops.wush.again(_tensors(leaves), kinds[key]))
    kind, kinds[key] = Kind(name, (leaves, spec)), len(_kinds)
    _kinds.append(kind)
    args, kwargs = _assembler(leaves, spec)(torch.ops.wush.enter(_tensors(leaves)))
    given, state = pytree.tree_leaves((args, kwargs)), _state(layer)
    result = forward(*args, **kwargs)
    outputs, out_spec = pytree.tree_flatten(result)
    if not _is_simple(result) or not _each_once(_tensors(outputs)):
        raise LayersDiffer(f"{name} returns more than tensors")
    if not _same(given, pytree.tree_leaves((args, kwargs))) or not _same(state, _state(layer)):
        raise LayersDiffer(f"{name} changes itself or its arguments")
    kind.outputs, kind.assemble = _tensors(outputs), _assembler(outputs, out_spec)
    return kind.assemble(torch.ops.wush.leave(kind.outputs))


@contextlib.contextmanager
def mark_calls(layers: dict[str, nn.Module], kind_of: dict[str, tuple]) -> Iterator[list[Kind]]:
    """Puts `enter`, `leave` and `again` in place of calls of these layers. Yields the list that the kinds go to."""
    global _kinds
    kinds: dict[tuple, int] = {}
    found = _kinds = []
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():

        def marked(*args, layer=layer, forward=layer.forward, name=name, **kwargs):
            return _marked_call(layer, forward, name, kind_of, kinds, args, kwargs)

        layer.forward = functools.wraps(layer.forward)(marked)
    try:
        yield found
        if has_inner_hooks(layers):
            raise LayersDiffer("the forward put a hook into a layer")
    finally:
        _kinds = []
        for name, layer in layers.items():
            del layer.forward
            if before[name] is not None:
                layer.forward = before[name]


# -- verify ----------------------------------------------------------------------------------------------------------


class _OpLog(TorchDispatchMode):
    """Records each op with the origin of its arguments: a name in `known`, or the earlier op that made the tensor."""

    def __init__(self, known: dict[str, Tensor]):
        super().__init__()
        self.entries: list[tuple] = []
        self._names = {id(tensor): name for name, tensor in known.items()}
        self._alive = list(known.values())

    def _describe(self, value: object) -> object:
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                if value.is_meta or value.numel() > 64:
                    raise LayersDiffer("a layer reads a tensor that is neither its own nor an argument")
                return "constant", str(value.tolist()), value.dtype
            return self._names[id(value)], tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, list | tuple):
            return tuple(map(self._describe, value))
        return repr(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        described = self._describe(args), tuple((key, self._describe(kwargs[key])) for key in sorted(kwargs))
        for i, argument in enumerate(function._schema.arguments if function._schema.is_mutable else ()):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(not self._names[id(t)].startswith("made") for t in _tensors(pytree.tree_leaves(value))):
                raise LayersDiffer(f"{function} writes into a tensor that the layer has not made")
        out = function(*args, **kwargs)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._names[id(tensor)] = f"made {len(self._alive)}"
                self._alive.append(tensor)
        self.entries.append((str(function), described))
        return out


def _concrete(size: int | torch.SymInt, scale: int) -> int:
    """Evaluates a traced size with every symbol at `scale` times its value in the example."""
    if isinstance(size, int):
        return size
    expression, environment = size.node.expr, size.node.shape_env
    # The name differs by PyTorch version.
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    return int(expression.xreplace({s: scale * int(known[s]) for s in expression.free_symbols}))


def _run(layer: nn.Module, leaves: list, spec: pytree.TreeSpec, scale: int) -> list[tuple]:
    """Runs a layer on the meta device with arguments of these sizes. Returns its ops and the origins of its results."""
    tensors = [
        torch.empty_strided(
            [_concrete(s, scale) for s in t.shape],
            [_concrete(s, scale) for s in t.stride()],
            dtype=t.dtype,
            device="meta",
        )
        for t in _tensors(leaves)
    ]
    known = {f"argument {i}": t for i, t in enumerate(tensors)}
    known |= dict(layer.named_parameters(remove_duplicate=False)) | dict(layer.named_buffers(remove_duplicate=False))
    args, kwargs = _assembler(leaves, spec)(tensors)
    with _OpLog(known) as ops, _compiling_state_context():  # `is_compiling()` is true, as in a trace
        out = layer(*args, **kwargs)
    return [*ops.entries, ops._describe(pytree.tree_leaves(out))]


def verify(kinds: list[Kind], meta: nn.Module) -> dict[str, int]:
    """Returns a number for the layers of every kind with more than one: equal for layers of a kind with the same ops.

    meta   a copy of the model on the meta device
    """
    numbers: dict[str, int] = {}
    for kind in kinds:
        seen: list[list] = []
        for name in (kind.name, *kind.others) if kind.others else ():
            ops = [_run(meta.get_submodule(name), *kind.inputs, scale) for scale in (1, 3)]
            if ops not in seen:
                seen.append(ops)
            numbers[name] = seen.index(ops)
    return numbers


# -- expand ----------------------------------------------------------------------------------------------------------


def _renamed(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


def _moved_meta(node: fx.Node, old: str, new: str) -> dict:
    """Returns a node's meta for the layer `new`. The format of a stack's keys varies: a suffix tells layers apart."""
    meta = dict(node.meta)
    if stack := meta.get("nn_module_stack"):
        meta["nn_module_stack"] = {
            key if _renamed(path, old, new) == path else f"{key}@{new}": (_renamed(path, old, new), kind)
            for key, (path, kind) in stack.items()
        }
    return meta


def _replace_marker(graph: fx.Graph, node: fx.Node, values: list[fx.Node]) -> None:
    """Replaces the results of `enter`, `leave` or `again` by these values and erases the node."""
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(values[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def expand_repeats(graph_module: fx.GraphModule, kinds: list[Kind]) -> None:
    """Replaces every `again` by a copy of the traced layer's nodes, and removes `enter` and `leave`."""
    graph, ops = graph_module.graph, torch.ops.wush
    nodes = list(graph.nodes)
    enters = [i for i, node in enumerate(nodes) if node.target is ops.enter.default]
    leaves = [i for i, node in enumerate(nodes) if node.target is ops.leave.default]
    bodies = [nodes[first + 1 : last] for first, last in zip(enters, leaves, strict=True)]
    names = [list(kind.others) for kind in kinds]
    if len(enters) != len(kinds) or sum(n.target is ops.again.default for n in nodes) != sum(map(len, names)):
        raise LayersDiffer("a layer is in a graph of its own, or not in the graph")
    if any(
        free_unbacked_symbols(node.meta["val"]) for body in bodies for node in body if node.meta.get("val") is not None
    ):
        raise LayersDiffer("a layer has sizes that depend on data")
    for node in nodes:
        if node.target is not ops.again.default:
            continue
        number = node.args[1]
        old, new = kinds[number].name, names[number].pop(0)
        enter, leave, copies = nodes[enters[number]], nodes[leaves[number]], {}

        def fetch(used: fx.Node, node=node, enter=enter, copies=copies, old=old, new=new) -> fx.Node:
            if used not in copies and used.op == "get_attr" and _renamed(used.target, old, new) != used.target:
                copies[used] = graph.get_attr(_renamed(used.target, old, new))
                copies[used].meta = _moved_meta(used, old, new)
            return copies.get(used, used)

        with graph.inserting_before(node):
            for member in bodies[number]:
                if member.target is operator.getitem and member.args[0] is enter:
                    copies[member] = node.args[0][member.args[1]]
                # Sizes are the same in all layers: the copies use the traced layer's.
                elif member.op == "call_function" and not isinstance(
                    member.meta.get("val"), (int, float, *SYMBOLIC_TYPES)
                ):
                    copies[member] = graph.node_copy(member, fetch)
                    copies[member].meta = _moved_meta(member, old, new)
        _replace_marker(graph, node, [fetch(value) for value in leave.args[0]])
    for first, last in zip(enters, leaves, strict=True):
        _replace_marker(graph, nodes[last], nodes[last].args[0])
        _replace_marker(graph, nodes[first], nodes[first].args[0])
    graph.lint()
    graph_module.recompile()
