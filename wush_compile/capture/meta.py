"""Copies the structure of a model without its weights."""

import copy

from torch import nn


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the model on the meta device, which takes no memory for weights."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    return copy.deepcopy(model, memo)
