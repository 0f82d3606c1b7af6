"""How transformers makes the tensors of a model from those of a checkpoint: it renames some, and joins others.

Checkpoints hold each expert's matrices (`experts.7.gate_proj.weight`), models the stacked ones. transformers knows how
to convert them while it loads a whole model. Here one tensor of the model is converted at a time.
"""

import copy
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ..errors import CheckpointError


class Conversion:
    """Which tensors of files make which tensors of a model.

    sources   name in the model -> the names in the files that it is made of
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]):
        mapping = get_model_conversion_mapping(model)
        renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
        converters = [step for step in mapping if isinstance(step, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        self._model = model
        self._steps: dict[str, tuple[WeightConverter | None, list[tuple[str, str | None]]]] = {}
        self._first: dict[str, str] = {}  # of the names that one conversion makes, the one that it is known by
        for name in sorted(names, key=dot_natural_key):  # experts in the order of their numbers
            made, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            converter = by_pattern.get(pattern)
            self._steps.setdefault(made, (converter, []))[1].append((name, pattern))
            for target in converter.target_patterns if converter else (made,):
                self._first[made.replace(converter.target_patterns[0], target) if converter else made] = made
        self.sources = {name: [source for source, _ in self._steps[first][1]] for name, first in self._first.items()}

    def make(self, name: str, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> Tensor:
        """Makes one tensor of the model; `read` gives tensors of the files."""
        first = self._first[name]
        converter, sources = self._steps[first]
        found = read([source for source, _ in sources])
        if converter is None:
            return found[sources[0][0]]
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
        return tensor[0] if isinstance(tensor, list) else tensor
