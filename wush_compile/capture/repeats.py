"""Traces one of the layers that a model repeats, and copies its nodes for the others: tracing costs by the layer.

    trace    the first layer of a kind runs between `wush::enter` and `wush::leave`; each further one that the model gives
             the same kind of arguments is a single node, `wush::again`
    verify   such layers do the same: on the meta device, at two sizes of the inputs, they call the same ops with the same
             arguments in the same order. Otherwise a `Different`, and the model is traced as a whole
    inline   every `again` becomes a copy of the nodes between `enter` and `leave`, with its own layer's weights

The model itself runs as always, so that what it passes to a layer (masks, say, that alternate) is in the graph as it is.
"""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# Fewer layers are traced as fast as they are.
LEAST = 4
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)

lib = torch.library.Library("wush", "FRAGMENT")
lib.define("enter(Tensor[] xs) -> Tensor[]")
lib.define("leave(Tensor[] xs) -> Tensor[]")
lib.define("again(Tensor[] xs, int kind) -> Tensor[]")


class Different(Exception):
    """Layers that looked alike are not."""


def _like(xs: list[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in xs]


@dataclass
class Kind:
    """Layers that get the same kind of arguments: the one that is traced, and what it returns."""

    name: str
    inputs: tuple[list, pytree.TreeSpec]
    outputs: list[Tensor] = field(default_factory=list)
    assemble: Callable[[list[Tensor]], object] | None = None
    others: list[str] = field(default_factory=list)


_kinds: list[Kind] = []
torch.library.register_fake("wush::enter", _like, lib=lib)
torch.library.register_fake("wush::leave", _like, lib=lib)
torch.library.register_fake("wush::again", lambda xs, kind: _like(_kinds[kind].outputs), lib=lib)


# -- trace -----------------------------------------------------------------------------------------------------------


def repeated(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of the model's lists of at least `LEAST` modules of one class, by name; none of them inside another.

    Empty where a layer shares weights with another, or has hooks inside: what these see cannot be told.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= LEAST and len({type(m) for m in module}) == 1:
            if not name.startswith(tuple(f"{other}." for other in found)):
                found |= {f"{name}.{i}": layer for i, layer in enumerate(module)}
    owners: dict[int, int] = {}
    for layer in found.values():
        for tensor in {id(t) for t in (*layer.parameters(), *layer.buffers())} | {id(layer)}:
            owners[tensor] = owners.get(tensor, 0) + 1
    alone = all(count == 1 for count in owners.values())
    return found if alone and not hooked(found) else {}


def hooked(layers: dict[str, nn.Module]) -> bool:
    """Whether anything inside the layers has a forward hook. The layers' own run at every call, marked or not."""
    inner = (module for layer in layers.values() for module in layer.modules() if module is not layer)
    return any(module._forward_hooks or module._forward_pre_hooks for module in inner)


def _signature(leaf: object) -> tuple:
    if isinstance(leaf, Tensor):
        return str(tuple(leaf.shape)), str(leaf.stride()), leaf.dtype, leaf.device
    return type(leaf), leaf


def _assembler(leaves: list, spec: pytree.TreeSpec) -> Callable[[list[Tensor]], object]:
    """Tensors -> the tree whose other leaves are these."""

    def assemble(tensors: list[Tensor]) -> object:
        rest = iter(tensors)
        return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)

    return assemble


def _tensors(leaves: list) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _state(layer: nn.Module) -> dict[tuple[int, str], object]:
    """Every attribute of the modules in a layer."""
    return {(i, key): value for i, module in enumerate(layer.modules()) for key, value in vars(module).items()}


def _same(one: dict | list, other: dict | list) -> bool:
    """The same objects under the same keys."""
    one, other = (dict(enumerate(x)) if isinstance(x, list) else x for x in (one, other))
    return one.keys() == other.keys() and all(value is other[key] for key, value in one.items())


def _is_simple(value: object) -> bool:
    """Tensors and plain values in tuples, lists and dicts: nothing else that a layer could leave its mark on."""
    if type(value) in (tuple, list):
        return all(map(_is_simple, value))
    return all(map(_is_simple, value.values())) if type(value) is dict else isinstance(value, (Tensor, *PLAIN))


def _each_once(tensors: list[Tensor]) -> bool:
    return bool(tensors) and len({id(t) for t in tensors}) == len(tensors)


def _call(layer: nn.Module, forward: Callable, name: str, kinds: dict[tuple, int], args: tuple, kwargs: dict) -> object:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if not _is_simple((args, kwargs)) or not _each_once(_tensors(leaves)):
        return forward(*args, **kwargs)
    key = (name.rpartition(".")[0], str(spec), *map(_signature, leaves))
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
        raise Different(f"{name} returns more than tensors")
    if not _same(given, pytree.tree_leaves((args, kwargs))) or not _same(state, _state(layer)):
        raise Different(f"{name} changes itself or its arguments")
    kind.outputs, kind.assemble = _tensors(outputs), _assembler(outputs, out_spec)
    return kind.assemble(torch.ops.wush.leave(kind.outputs))


@contextlib.contextmanager
def marked(layers: dict[str, nn.Module]) -> Iterator[list[Kind]]:
    """While the block runs, calls of these layers leave their marks in a trace; the kinds found."""
    global _kinds
    kinds: dict[tuple, int] = {}
    found = _kinds = []
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():

        def marking(*args, layer=layer, forward=layer.forward, name=name, **kwargs):
            return _call(layer, forward, name, kinds, args, kwargs)

        layer.forward = functools.wraps(layer.forward)(marking)
    try:
        yield found
        if hooked(layers):
            raise Different("a hook was put into a layer")
    finally:
        _kinds = []
        for name, layer in layers.items():
            del layer.forward
            if before[name] is not None:
                layer.forward = before[name]


# -- verify ----------------------------------------------------------------------------------------------------------


class _Log(TorchDispatchMode):
    """The ops that run, their arguments by where these come from."""

    def __init__(self, known: dict[str, Tensor]):
        super().__init__()
        self.entries: list[tuple] = []
        self._names = {id(tensor): name for name, tensor in known.items()}
        self._alive = list(known.values())

    def _describe(self, value: object) -> object:
        if isinstance(value, Tensor):
            if id(value) not in self._names:
                if value.is_meta or value.numel() > 64:
                    raise Different("a tensor from elsewhere")
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
                raise Different(f"{function} writes into what is not the layer's own")
        out = function(*args, **kwargs)
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._names[id(tensor)] = f"made {len(self._alive)}"
                self._alive.append(tensor)
        self.entries.append((str(function), described))
        return out


def _concrete(size: int | torch.SymInt, scale: int) -> int:
    """A traced size, at `scale` times the example's symbols."""
    if isinstance(size, int):
        return size
    expression, environment = size.node.expr, size.node.shape_env
    known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val  # by version of PyTorch
    return int(expression.xreplace({s: scale * int(known[s]) for s in expression.free_symbols}))


def _run(layer: nn.Module, leaves: list, spec: pytree.TreeSpec, scale: int) -> list[tuple]:
    """What a layer on the meta device does with such arguments, and what it returns of it."""
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
    with _Log(known) as log:
        out = layer(*args, **kwargs)
    return [*log.entries, log._describe(pytree.tree_leaves(out))]


def verify(kinds: list[Kind], skeleton: nn.Module) -> None:
    """`Different` where a layer of a kind does not do what the traced one does. `skeleton`: the model on the meta device."""
    for kind in kinds:
        for scale in (1, 3) if kind.others else ():
            expected = _run(skeleton.get_submodule(kind.name), *kind.inputs, scale)
            for name in kind.others:
                if _run(skeleton.get_submodule(name), *kind.inputs, scale) != expected:
                    raise Different(f"{name} is not what {kind.name} is")


# -- inline ----------------------------------------------------------------------------------------------------------


def _renamed(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}.") else path


def _moved_meta(node: fx.Node, old: str, new: str) -> dict:
    """A node's meta in another layer. Module stacks are keyed by attribute paths, in one way or another."""
    meta = dict(node.meta)
    if stack := meta.get("nn_module_stack"):
        meta["nn_module_stack"] = {
            key if _renamed(path, old, new) == path else f"{key}@{new}": (_renamed(path, old, new), kind)
            for key, (path, kind) in stack.items()
        }
    return meta


def _take_out(graph: fx.Graph, node: fx.Node, values: list[fx.Node]) -> None:
    """Replaces a mark, whose results are these values."""
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(values[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def inline(graph_module: fx.GraphModule, kinds: list[Kind]) -> None:
    """Replaces the marks in a traced graph by the nodes they stand for."""
    graph, ops = graph_module.graph, torch.ops.wush
    nodes = list(graph.nodes)
    enters = [i for i, node in enumerate(nodes) if node.target is ops.enter.default]
    leaves = [i for i, node in enumerate(nodes) if node.target is ops.leave.default]
    bodies = [nodes[first + 1 : last] for first, last in zip(enters, leaves, strict=True)]
    names = [list(kind.others) for kind in kinds]
    if len(enters) != len(kinds) or sum(n.target is ops.again.default for n in nodes) != sum(map(len, names)):
        raise Different("a layer is in a graph of its own, or not in the graph")
    if any(
        free_unbacked_symbols(node.meta["val"]) for body in bodies for node in body if node.meta.get("val") is not None
    ):
        raise Different("a layer has sizes that depend on data")
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
                elif member.op == "call_function" and not isinstance(member.meta.get("val"), (int, float, *SYMBOLIC)):
                    copies[member] = graph.node_copy(member, fetch)  # sizes are the same in all layers: not again
                    copies[member].meta = _moved_meta(member, old, new)
        _take_out(graph, node, [fetch(value) for value in leave.args[0]])
    for first, last in zip(enters, leaves, strict=True):
        _take_out(graph, nodes[last], nodes[last].args[0])
        _take_out(graph, nodes[first], nodes[first].args[0])
    graph.lint()
    graph_module.recompile()
