"""Where the weights of a stage come from. `streaming.py` has the same for a checkpoint on disk."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ModelTensors:
    """The parameters and buffers of a model in memory, by name.

    device   where the model is
    home     where solved groups wait until they are installed; the meta device: in the journal
    """

    def __init__(self, model: nn.Module):
        self.device = self.home = next(model.parameters()).device
        self._tensors = {
            name: tensor.detach() for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def load(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The tensors of these names on a device: the model's own where they are there already."""
        return {name: self._tensors[name].to(device) for name in names}
