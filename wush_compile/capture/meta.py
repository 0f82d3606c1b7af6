"""Copies the structure of a model without its weights."""

import copy

from torch import nn

from .wrappers import without_hooks


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy of the model on the meta device, which takes no memory for weights, without accelerate's hooks."""
    tensors = [*model.parameters(), *model.buffers()]
    memo = {
        id(t): nn.Parameter(t.to("meta"), requires_grad=False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    # The hooks of an offloaded model hold its weights.
    memo |= {id(hook): None for m in model.modules() if (hook := vars(m).get("_hf_hook")) is not None}
    return without_hooks(copy.deepcopy(model, memo))
