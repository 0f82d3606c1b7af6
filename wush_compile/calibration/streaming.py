"""Reads a model's weights from sharded safetensors, one stage at a time. The model is never in memory as a whole."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.conversion import Conversion
from ..checkpoint.files import Shards, weight_files
from ..checkpoint.source import check_complete, empty_model, ignores
from ..errors import CheckpointError
from .tensors import check_finite


class CheckpointTensors:
    """The parameters and buffers of a transformers model on the meta device, read from its files on demand.

    It has the interface of `tensors.ModelTensors`. Solved groups stay in the journal.
    """

    device = home = torch.device("meta")

    def __init__(self, model: nn.Module, shards: Shards):
        self._shards = shards
        self._tensors = {
            name: tensor.detach()
            for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }
        self._weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._sources = _sources(model, shards)
        self._conversion = Conversion(model, shards)
        made = self._conversion.sources
        missing = [name for name in self._weights if name not in self._sources and name not in made]
        if missing:
            raise CheckpointError(
                f"the files have no tensor for {min(missing)}"
                + (f" and {len(missing) - 1} more" if missing[1:] else "")
                + f": {type(model).__name__} uses other names than the files, or tensors are missing; quantize it "
                "without streaming"
            )
        used = {n for target, sources in made.items() if target in self._tensors for n in sources}
        used |= set(self._sources.values())
        left_over = [n for n in shards.specs if n not in used and not ignores(model, n)]
        check_complete("the directory", type(model), (), left_over)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self) -> None:
        """Does nothing, because `load` checks what it reads."""

    def load(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Returns the named tensors on a device, in the model's dtype. NaN or Inf in a weight is a `NonFiniteError`."""
        names = list(names)
        read = self._shards.each({self._sources[name] for name in names if name in self._sources})
        # To a CPU by a copy, else a tensor would keep its file mapped.
        found = {name: tensor.to(device, copy=True) for name, tensor in read}
        loaded = {}
        for name in names:
            like = self._tensors[name]
            tensor = like
            if name in self._sources:
                tensor = found[self._sources[name]].to(like.dtype)
            elif name in self._conversion.sources:
                tensor = self._conversion.make(name, like, device)
            if tensor.shape != like.shape:
                raise CheckpointError(f"{name} is {list(tensor.shape)} in the file, {list(like.shape)} by config.json")
            loaded[name] = tensor = tensor.to(device)
            if name in self._weights:
                check_finite(name, tensor)
        return loaded


def _sources(model: nn.Module, shards: Shards) -> dict[str, str]:
    """Maps each name in the model to a name in the files: the same, a tied one, or one with or without the prefix."""
    prefix, sources = f"{model.base_model_prefix}.", {}
    aliases: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        candidates = [n for name in names for n in (name, name.removeprefix(prefix), prefix + name)]
        source = next((n for n in candidates if n in shards.specs), None)
        if source is not None:
            sources |= dict.fromkeys(names, source)
    return sources


def open_checkpoint(directory: str | Path) -> tuple[nn.Module, CheckpointTensors]:
    """Returns (the model of a directory on the meta device, the tensors of its files)."""
    path = Path(directory)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{directory} is not a directory with a config.json: give the directory of a local model")
    shards = Shards(weight_files(path))
    floats = [spec.dtype for spec in shards.specs.values() if spec.dtype.is_floating_point]
    model = empty_model(path, floats[0] if floats else torch.float32)
    return model, CheckpointTensors(model, shards)
