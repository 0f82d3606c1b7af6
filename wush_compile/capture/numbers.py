"""Keeps the values of tensors that a model on the meta device makes from Python numbers.

`torch.tensor(0.0, device=mask.device)` becomes a constant of the graph. On the meta device a constant has no values, so
a streamed model could not run its graph. Here the graph gets an op that makes the tensor.
"""

from numbers import Number

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


def _are_numbers(data: object) -> bool:
    """Whether data is a number or lists of numbers. A symbol for a size is none."""
    if isinstance(data, list | tuple):
        return len(data) > 0 and all(map(_are_numbers, data))
    return isinstance(data, Number)


def _made(data: object, like: dict[str, object]) -> Tensor:
    """A tensor of numbers, by ops of a graph."""
    if isinstance(data, list | tuple):
        return torch.stack([_made(part, like) for part in data])
    return torch.full((), data, **like)


def _on_meta(function: object, args: tuple, kwargs: dict[str, object]) -> Tensor | None:
    """What a call that makes a tensor of numbers on the meta device makes, by ops of a graph; None for other calls."""
    if function is Tensor.new_tensor:
        like, *given = args
        dtype, device = kwargs.get("dtype") or like.dtype, kwargs.get("device") or like.device
    elif function in MAKERS:
        given, dtype, device = args, kwargs.get("dtype"), kwargs.get("device")
    else:
        return None
    if len(given) != 1 or not _are_numbers(given[0]) or device is None or torch.device(device).type != "meta":
        return None
    if dtype is None:
        with _disable_current_modes():
            dtype = torch.tensor(given[0]).dtype
    return _made(given[0], {"dtype": dtype, "device": device})


class NumbersOnMeta(TorchFunctionMode):
    """Makes tensors of numbers on the meta device by `full` and `stack`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = _on_meta(function, args, kwargs or {})
        return function(*args, **(kwargs or {})) if made is None else made
