"""The order in which GPTQ rounds blocks (docs/spec.md §3): those whose inputs have the largest power first.

What is rounded first hands its errors to all others. GPTQ goes from the last channel to the first, so the solver lays
the blocks of least power first. Only GPTQ and its sweeps see this order.
"""

import torch
from torch import Tensor

from ..recipe import Recipe

# Entries of a second moment that are copied at a time.
COPIED_ELEMENTS = 2**23


def order_of_blocks(recipe: Recipe, h: Tensor) -> Tensor | None:
    """Which block lies where, int64 [K/B]: by the trace of its moment in h [K/B, B, B], ties as they were.

    None if blocks stay where they are: conditional moments belong to the order of the model's channels.
    """
    if recipe.solver != "gptq" or recipe.moments == "conditional":
        return None
    return h.diagonal(dim1=-2, dim2=-1).sum(-1).argsort(stable=True)


def in_order(x: Tensor | None, order: Tensor | None, dim: int = 0) -> Tensor | None:
    """A copy of x with the blocks that dimension `dim` consists of in this order. None, and a single T, as they are."""
    if x is None or order is None or x.shape[dim] == 1:
        return x
    return x.unflatten(dim, (len(order), -1)).index_select(dim, order).flatten(dim, dim + 1)


def out_of_order(x: Tensor | None, order: Tensor | None, dim: int = 0) -> Tensor | None:
    """The inverse of `in_order`."""
    return in_order(x, None if order is None else order.argsort(), dim)


def moment_in_order(moment: Tensor, order: Tensor) -> Tensor:
    """[K, K] -> float64 [K, K] on the device of `order`, the blocks of both sides in this order.

    Beside the result only some rows are in memory.
    """
    size, blocks = len(moment), torch.arange(len(moment), device=order.device).view(len(order), -1)
    channels, found = blocks[order].flatten(), torch.empty((size, size), dtype=torch.float64, device=order.device)
    step = max(1, COPIED_ELEMENTS // size)
    for here, rows in zip(found.split(step), channels.split(step), strict=True):
        here.copy_(moment[rows.to(moment.device)].to(order.device)[:, channels])
    return found
