"""How transformers makes the tensors of a model from those of a checkpoint: it renames some, and joins others.

Checkpoints hold each expert's matrices (`experts.7.gate_proj.weight`), models the stacked ones. transformers knows how
to convert them while it loads a whole model. Here one tensor of the model is converted at a time. Experts' matrices are
copied one after the other to their place in the stacked tensor, so that no second copy of a layer is in memory.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..errors import CheckpointError
from .files import Shards


def _joins_experts(converter: WeightConverter) -> bool:
    """Whether a conversion stacks the matrices of each pattern, and puts the stacks one behind the other in rows."""
    first, *rest = converter.operations
    stacks = type(first) is MergeModulelist and first.dim == 0 and len(converter.target_patterns) == 1
    return stacks and (
        [type(op) for op in rest] == [Concatenate] and rest[0].dim == 1 if rest else len(converter.source_patterns) == 1
    )


class Conversion:
    """Which tensors of files make which tensors of a model.

    sources   name in the model -> the names in the files that it is made of
    """

    def __init__(self, model: PreTrainedModel, shards: Shards):
        mapping = get_model_conversion_mapping(model)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        self._model, self._shards = model, shards
        self._steps: dict[str, tuple[WeightConverter | None, list[tuple[str, str | None]]]] = {}
        self._first: dict[str, str] = {}  # of the names that one conversion makes, the one that it is known by
        for name in sorted(shards.specs, key=dot_natural_key):  # experts in the order of their numbers
            made, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            converter = by_pattern.get(pattern)
            self._steps.setdefault(made, (converter, []))[1].append((name, pattern))
            for target in converter.target_patterns if converter else (made,):
                self._first[made.replace(converter.target_patterns[0], target) if converter else made] = made
        self.sources = {name: [source for source, _ in self._steps[first][1]] for name, first in self._first.items()}

    def make(self, name: str, like: Tensor, device: torch.device) -> Tensor:
        """Makes one tensor of the model, in the shape and dtype of `like`, on a device."""
        first = self._first[name]
        converter, sources = self._steps[first]
        if converter is None:
            return self._shards.tensor(sources[0][0]).to(device, like.dtype)
        if _joins_experts(converter) and (places := self._places(converter, sources, like.shape)) is not None:
            made = torch.empty(like.shape, dtype=like.dtype, device=device)
            for source, tensor in self._shards.each(places):
                expert, rows = places[source]
                made[expert, rows].copy_(tensor)
            return made
        found = self._shards.tensors([source for source, _ in sources])
        converter = copy.deepcopy(converter)
        for source, pattern in sources:
            converter.add_tensor(first, source, pattern, found.pop(source))
        try:
            made = converter.convert(first, model=self._model, config=self._model.config)
            tensor = made[name]
        except Exception as error:
            raise CheckpointError(
                f"{name} cannot be made of {sources[0][0]} and {len(sources) - 1} more tensors of the files "
                f"({type(error).__name__}: {error}): quantize the model without streaming"
            ) from error
        return (tensor[0] if isinstance(tensor, list) else tensor).to(device, like.dtype)

    def _places(
        self, converter: WeightConverter, sources: Iterable[tuple[str, str | None]], shape: torch.Size
    ) -> dict[str, tuple[int, slice]] | None:
        """Where each matrix goes: (expert, rows). None if they are not one of each expert for each pattern, or do not
        fill a tensor of this shape [E, N, K]."""
        by_pattern = {pattern: [n for n, p in sources if p == pattern] for pattern in converter.source_patterns}
        places, start = {}, 0
        for names in by_pattern.values():
            sizes = {self._shards.specs[name].shape for name in names}
            if len(names) != shape[0] or len(sizes) != 1 or len(size := sizes.pop()) != 2 or size[1] != shape[-1]:
                return None
            rows = slice(start, start := start + size[0])
            places |= {name: (expert, rows) for expert, name in enumerate(names)}
        return places if len(shape) == 3 and start == shape[1] else None
