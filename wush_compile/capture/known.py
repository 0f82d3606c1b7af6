"""Computes for real, during a trace, what depends on nothing but inputs whose values are known.

A vision encoder turns the grid of its images into lengths, indices and positions, and asks for their values: a trace
that has symbols for them stops there. With the values of the grid, the graph holds for this grid alone, and what is
computed from it becomes constants of the graph.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _is_known(leaf: object) -> bool:
    return type(leaf) is Tensor and not isinstance(leaf, FakeTensor)


class KnownValues(TorchFunctionMode):
    """Runs a function outside the trace if all its tensors are real ones, and it has no symbols."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not all(map(_is_known, tensors)) or any(isinstance(leaf, SYMBOLS) for leaf in leaves):
            return function(*args, **kwargs)
        if not tensors and not _makes_integers(function, args, kwargs):
            return function(*args, **kwargs)
        with _disable_current_modes():
            return function(*args, **kwargs)


def _makes_integers(function: object, args: tuple, kwargs: dict) -> bool:
    """Whether a function makes a tensor of integers from numbers alone: positions, lengths, masks."""
    if function not in (torch.arange, torch.tensor, torch.zeros, torch.ones, torch.full, torch.cat):
        return False
    numbers = [leaf for leaf in pytree.tree_leaves(args) if not isinstance(leaf, (torch.dtype, torch.device, str))]
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return not dtype.is_floating_point
    return function in (torch.arange, torch.tensor) and all(isinstance(number, int) for number in numbers)
