"""Traces a model on an example batch: one graph of the whole forward, with `aten.linear` nodes and weights by name.

`torch.export` makes the graph, non-strict and with every dimension `Dim.AUTO`. The graph has no KV cache. Its batch and
its length are dynamic, it shares the weights with the model, and every node has an `nn_module_stack`. A model that
cannot be traced so gets a graph for the sizes of the example alone.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..data import Batch
from ..errors import CaptureError, DataError
from ..experts import is_experts
from . import repeats
from .known import KnownValues
from .numbers import NumbersOnMeta

PLAIN_TYPES = (type(None), bool, int, float, str)


@dataclass
class Captured:
    """A traced forward.

    graph_module  its placeholders are the flattened inputs; its weights are `get_attr` nodes under their own names
    keys          names of the keyword inputs, in the order of the placeholders; None for positional inputs
    guards        raises an `AssertionError` if the graph is not valid for inputs of these sizes; None if it always is
    model         what was traced
    sizes         the only sizes of the inputs that the graph is valid for, by placeholder; None for a dynamic graph
    values        the only values of some keyword inputs that it is valid for, by name
    """

    graph_module: fx.GraphModule
    keys: tuple[str, ...] | None
    guards: nn.Module | None = None
    model: nn.Module | None = None
    sizes: dict[str, torch.Size] | None = None
    values: dict[str, Tensor] | None = None

    def placeholders(self) -> list[fx.Node]:
        """Returns the graph's inputs in order."""
        return [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]

    def flatten(self, index: int, batch: Batch) -> dict[str, object]:
        """Returns the value of each placeholder by name. Raises `DataError` if the batch has other inputs."""
        if isinstance(batch, dict):
            if self.keys is None or set(batch) != set(self.keys):
                raise DataError(
                    f"batch {index} has the inputs {sorted(batch)}, the first one had {list(self.keys or ())}: "
                    "give every batch the same inputs"
                )
            leaves = pytree.tree_leaves([batch[key] for key in self.keys])
        else:
            if self.keys is not None:
                raise DataError(f"batch {index} is a tensor, the first one a dict: give every batch the same inputs")
            leaves = pytree.tree_leaves(batch)
        return dict(zip((p.name for p in self.placeholders()), leaves, strict=True))

    def refusal(self, batch: Batch) -> str | None:
        """Returns the condition of the graph that a batch breaks; None if the graph is valid for the batch."""
        inputs = self.flatten(0, batch)
        for name, size in (self.sizes or {}).items():
            if inputs[name].shape != size:
                return f"{name} of the size {list(size)}"
        for name, value in (self.values or {}).items():
            if not torch.equal(batch[name], value):
                return f"{name} of the values {value.flatten()[:8].tolist()}"
        if self.guards is None:
            return None
        try:
            self.guards(*inputs.values())
        except AssertionError as error:
            return str(error).removeprefix("Guard failed: ").split("\n")[0]
        return None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in eval mode for the block, then restores the mode of every module."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _configs(model: nn.Module) -> list[object]:
    """Returns the configurations of all modules and the configurations inside them, each once."""
    found: dict[int, object] = {}
    left = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    while left:
        config = left.pop()
        if hasattr(config, "__dict__") and id(config) not in found:
            found[id(config)] = config
            left += [value for key, value in vars(config).items() if key.endswith("config")]
    return list(found.values())


def constant_inputs(model: nn.Module) -> dict[str, object]:
    """Returns the inputs that stop a Hugging Face decoder from building a KV cache, which nothing here reads."""
    config = getattr(model, "config", None)
    # Export refuses an input that only **kwargs accepts.
    named = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if named and getattr(config, "use_cache", None) is not None else {}


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Stops a model from building a KV cache in the block, which nothing here reads.

    A vision-language model takes the setting from the configuration of its language part.
    """
    changed = [config for config in _configs(model) if vars(config).get("use_cache")]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextlib.contextmanager
def with_grouped_experts(model: nn.Module) -> Iterator[None]:
    """Runs mixtures of experts by grouped products in the block, which can be traced, in place of a loop over experts.

    transformers' experts ask the configuration that they hold how to run.
    """
    held = {id(config): config for m in model.modules() if is_experts(m) and (config := vars(m).get("config"))}
    before = [(config, getattr(config, "_experts_implementation", None)) for config in held.values()]
    for config, _ in before:
        config._experts_implementation = "grouped_mm"
    try:
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def _tensors_in(leaf: object) -> object:
    """Returns a result that export can return: a tensor, a plain value, or the tensors among an object's attributes."""
    if isinstance(leaf, (Tensor, *PLAIN_TYPES)):
        return leaf
    return {name: value for name, value in getattr(leaf, "__dict__", {}).items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def traceable(model: nn.Module, example: Batch, known: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Gives the model, in the block, a forward that names its inputs and returns no other objects than tensors.

    Export refuses an input that only `**kwargs` accepts, and a result of an unknown class, such as a cache.

    known   inputs by name whose values the forward takes in place of those that it is called with
    """
    before, forward = vars(model).get("forward"), model.forward
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    # A default of `use_cache=True` in the signature would win over the configuration.
    off = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}

    def traced(*args: object, **kwargs: object) -> object:
        if known:
            with KnownValues():
                result = forward(*args, **(kwargs | known), **off)
            return pytree.tree_map(_tensors_in, result)
        with NumbersOnMeta() if on_meta else contextlib.nullcontext():
            result = forward(*args, **kwargs, **(off if kwargs else {}))
        return pytree.tree_map(_tensors_in, result)

    if isinstance(example, dict):
        named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in example]
        traced.__signature__ = inspect.Signature(named)
    else:
        traced.__signature__ = inspect.signature(forward)
    model.forward = traced
    try:
        with without_cache(model), with_grouped_experts(model):
            yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _examples(batch: Batch) -> list[Batch]:
    """Returns the inputs to trace with, the best first: two rows in place of one, then the batch itself.

    Export traces a dimension of size one as a constant, and a batch of one row must not make the graph one for single
    rows. The inputs that have a batch dimension are not known. So the first try is that all inputs have one, the second
    that vectors have none.
    """
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]

    def widened(least: int) -> Batch | None:
        wide = [t for t in tensors if t.dim() >= least]
        if not wide or any(len(t) != 1 for t in wide):
            return None
        return pytree.tree_map(lambda t: t.repeat_interleave(2, 0) if t.dim() >= least else t, batch)

    first = widened(1)
    tries = [first, widened(2) if first is None else None, batch]
    return [example for example in tries if example is not None]


def _dynamic(value: object) -> dict[int, object] | None:
    if not isinstance(value, Tensor):
        return None
    return {d: Dim.STATIC if size == 1 or _is_spatial(value, d) else Dim.AUTO for d, size in enumerate(value.shape)}


def _is_spatial(value: Tensor, dim: int) -> bool:
    """Whether a dimension is one of channels, frames, height or width of images or videos [B, .., C, H, W].

    Models cut images into windows and interpolate position embeddings with arithmetic that takes symbols for sizes
    minutes, or does not take them. Images of other sizes get a graph of their own.
    """
    return value.dim() > 3 and value.is_floating_point() and dim > 0


@contextlib.contextmanager
def _settings(real: bool) -> Iterator[None]:
    """Runs compiled parts of a model in eager mode, and does without the cache of fake tensors.

    That cache checks every entry with a second, symbolic output. In graphs whose ops differ this takes half the time.

    real   compute with the example's numbers beside the symbols, for code that asks for values
    """
    numbers = torch._functorch.config.patch(
        fake_tensor_propagate_real_tensors=real, generate_fake_kernels_from_real_mismatches=real
    )
    with torch.compiler.set_stance("force_eager"), torch._dynamo.config.patch(fake_tensor_cache_enabled=False), numbers:
        yield


def _export(
    model: nn.Module, example: Batch, dynamic: bool = True, real: bool = False, known: dict[str, Tensor] | None = None
) -> torch.export.ExportedProgram:
    # New tensors, since a trace marks those that it gets as dynamic, for every later trace.
    example = pytree.tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, example)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    shapes = {k: _dynamic(v) for k, v in kwargs.items()} if kwargs else tuple(_dynamic(v) for v in args)
    shapes = shapes if dynamic else None
    with traceable(model, example, known), _settings(real):
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _failing_module(model: nn.Module, example: Batch) -> str:
    """Exports again and returns the name of the innermost module that runs when the export fails."""
    running, failed, handles = [], [], []

    def enter(name: str):
        return lambda *_: running.append(name)

    def leave(*_):
        running.pop()

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        _export(model, example)
    except Exception:
        failed = list(running)
    finally:
        for handle in handles:
            handle.remove()
    return failed[-1] if failed and failed[-1] else type(model).__name__


def _remedy(model: nn.Module, example: Batch, module: str) -> str:
    """Returns what helps a user whose model cannot be traced on these inputs, because it stops in a module."""
    text = ("input", "attention_mask", "position", "token_type")
    others = [name for name in example if not name.startswith(text)] if isinstance(example, dict) else []
    if others and "input_ids" in example and any(example[name].is_floating_point() for name in others):
        with contextlib.suppress(Exception):
            model(**{name: value for name, value in example.items() if name not in others})
            return f"Calibrate on text alone, without {', '.join(others)}: then its language part is quantized."
    part = f", such as one that does not hold {module!r}" if "." in module else ""
    return (
        f"Make its forward traceable (no data-dependent Python control flow), or quantize a traceable submodule{part}."
    )


def _take_guards(graph_module: fx.GraphModule) -> nn.Module | None:
    """Removes the check of the inputs' sizes from a graph and returns it."""
    node = next((n for n in graph_module.graph.nodes if n.op == "call_module" and n.target == "_guards_fn"), None)
    if node is None:
        return None
    guards = graph_module.get_submodule(node.target)
    graph_module.graph.erase_node(node)
    graph_module.delete_submodule(node.target)
    graph_module.recompile()
    return guards


def _describes(value: object, name: str, inputs: dict[str, Tensor]) -> bool:
    """Whether an input describes others, as the grid of an image does: it is no token and stands beside no token."""
    ids = inputs.get("input_ids")
    return _is_no_token(value, name, inputs) and (ids is None or value.shape[:2] != ids.shape)


def _is_no_token(value: object, name: str, inputs: dict[str, Tensor]) -> bool:
    """Whether an input holds integers that are neither tokens nor a mask."""
    integers = isinstance(value, Tensor) and not value.is_floating_point()
    return integers and not name.endswith("input_ids") and not name.endswith("mask")


# Arguments of `_trace` for a model whose code takes no symbols for sizes, or asks for values of tensors.
OTHER_WAYS = (
    dict(holds=_describes),
    dict(holds=_describes, dynamic=False),
    dict(holds=_is_no_token),
    dict(holds=_is_no_token, dynamic=False),
    dict(dynamic=False),
    dict(real=True),
    dict(real=True, dynamic=False),
)


def _trace(
    model: nn.Module,
    example: Batch,
    dynamic: bool = True,
    real: bool = False,
    holds: Callable[[object, str, dict], bool] | None = None,
) -> Captured:
    """Traces the model.

    dynamic   symbols for sizes; otherwise the graph is valid for the sizes of the example alone
    real      the example's numbers beside the symbols; the graph asserts what the code asked of them
    holds     (value, name, inputs) -> whether the graph shall be valid for these values of the input alone
    """
    keys = tuple(example) if isinstance(example, dict) else None
    known = {k: v for k, v in example.items() if holds(v, k, example)} if keys and holds else {}
    if holds and not known:
        raise CaptureError("there is no such input")
    plain = not (real or known)
    graph_module = repeats.export_by_layers(model, lambda: _export(model, example, dynamic)) if plain else None
    if graph_module is None:
        graph_module = _export(model, example, dynamic, real, known).module()
    captured = Captured(graph_module, keys, _take_guards(graph_module), model, values=known)
    if not dynamic:
        inputs = captured.flatten(0, example).items()
        captured.sizes = {name: value.shape for name, value in inputs if isinstance(value, Tensor)}
    return captured


def largest_batch(batches: list[Batch]) -> Batch:
    """Returns the batch with the most elements, on which a model is traced."""
    return max(batches, key=lambda b: sum(t.numel() for t in pytree.tree_leaves(b) if isinstance(t, Tensor)))


def capture(model: nn.Module, batches: list[Batch]) -> Captured:
    """Traces the model's forward on the largest batch. The graph is valid for this batch at least.

    Raises `CaptureError` if `torch.export` cannot trace the model.
    """
    largest = largest_batch(batches)
    with evaluating(model), torch.no_grad():
        *widened, own = _examples(largest)
        for example in widened:
            with contextlib.suppress(Exception):
                captured = _trace(model, example)
                if captured.refusal(largest) is None:
                    return captured
        try:
            return _trace(model, own)
        except Exception as error:
            for way in OTHER_WAYS:
                with contextlib.suppress(Exception):
                    return _trace(model, own, **way)
            reason, module = str(error).strip().split("\n")[0], _failing_module(model, own)
            raise CaptureError(
                f"torch.export cannot trace {type(model).__name__}: it stopped in module {module!r} with "
                f"{type(error).__name__}: {reason}. {_remedy(model, own, module)}"
            ) from error
