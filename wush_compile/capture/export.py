"""Traces a model on an example batch: one graph of the whole forward, with `aten.linear` nodes and weights by name.

`torch.export` makes the graph, non-strict and with every dimension `Dim.AUTO`. The graph has no KV cache. Its batch and
its length are dynamic, it shares the weights with the model, and every node has an `nn_module_stack`.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..data import Batch
from ..errors import CaptureError, DataError
from . import repeats


@dataclass
class Captured:
    """A traced forward.

    graph_module  its placeholders are the flattened inputs; its weights are `get_attr` nodes under their own names
    keys          names of the keyword inputs, in the order of the placeholders; None for positional inputs
    constants     keyword inputs that are the same for every batch (`use_cache=False`)
    """

    graph_module: fx.GraphModule
    keys: tuple[str, ...] | None
    constants: dict[str, object]

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
            kwargs = {**{key: batch[key] for key in self.keys}, **self.constants}
            leaves = pytree.tree_leaves(((), kwargs))
        else:
            if self.keys is not None:
                raise DataError(f"batch {index} is a tensor, the first one a dict: give every batch the same inputs")
            leaves = pytree.tree_leaves((batch, {}))
        return dict(zip((p.name for p in self.placeholders()), leaves, strict=True))


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


def constant_inputs(model: nn.Module) -> dict[str, object]:
    """Returns the inputs that stop a Hugging Face decoder from building a KV cache, which nothing here reads."""
    config = getattr(model, "config", None)
    # Export refuses an input that only **kwargs accepts.
    named = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if named and getattr(config, "use_cache", None) is not None else {}


def _example(batch: Batch) -> Batch:
    """Repeats a batch of one row to two rows, because export traces a dimension of size one as a constant."""

    def widen(t: object) -> object:
        return t.repeat_interleave(2, 0) if isinstance(t, Tensor) and t.dim() > 1 and t.shape[0] == 1 else t

    return {k: widen(v) for k, v in batch.items()} if isinstance(batch, dict) else tuple(widen(v) for v in batch)


def _dynamic(value: object) -> dict[int, object] | None:
    return dict.fromkeys(range(value.dim()), Dim.AUTO) if isinstance(value, Tensor) else None


def _export(model: nn.Module, example: Batch, constants: dict[str, object]) -> torch.export.ExportedProgram:
    args, kwargs = ((), {**example, **constants}) if isinstance(example, dict) else (example, {})
    shapes = {k: _dynamic(v) for k, v in kwargs.items()} if kwargs else tuple(_dynamic(v) for v in args)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def _failing_module(model: nn.Module, example: Batch, constants: dict[str, object]) -> str:
    """Exports again and returns the name of the innermost module that runs when the export fails."""
    running, failed, handles = [], [], []

    def enter(name: str):
        return lambda *_: running.append(name)

    def leave(*_):
        running.pop()

    for name, module in model.named_modules():
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    try:
        _export(model, example, constants)
    except Exception:
        failed = list(running)
    finally:
        for handle in handles:
            handle.remove()
    return failed[-1] if failed and failed[-1] else type(model).__name__


def largest_batch(batches: list[Batch]) -> Batch:
    """The batch with the most elements, on which a model is traced."""
    return max(batches, key=lambda b: sum(t.numel() for t in pytree.tree_leaves(b) if isinstance(t, Tensor)))


def capture(model: nn.Module, batches: list[Batch]) -> Captured:
    """Traces the model's forward on the largest batch. Raises `CaptureError` if `torch.export` cannot trace it."""
    largest = largest_batch(batches)
    example, constants = _example(largest), constant_inputs(model) if isinstance(largest, dict) else {}
    with evaluating(model), torch.no_grad():
        graph_module = repeats.export_by_layers(model, lambda: _export(model, example, constants))
        try:
            if graph_module is None:
                graph_module = _export(model, example, constants).module()
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise CaptureError(
                f"torch.export cannot trace {type(model).__name__}: it stopped in module "
                f"{_failing_module(model, example, constants)!r} with {type(error).__name__}: {reason}. "
                "Make its forward traceable (no data-dependent Python control flow), or quantize a traceable submodule."
            ) from error
    return Captured(graph_module, tuple(largest) if isinstance(largest, dict) else None, constants)
