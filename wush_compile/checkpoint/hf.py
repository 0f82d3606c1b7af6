"""Hugging Face transformers: `from_pretrained` and `save_pretrained` of quantized models.

Importing this file registers the quantization method "wush". Loading puts empty groups into the skeleton and joins the
rows of their linears while transformers reads them; saving splits them again (SPEC §7).
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from ..modules import WushGroup, install_group, named_groups
from .files import DIGEST, Weights, digest
from .layout import build_groups, check_specs, group_specs, join_rows, parts, read_record, split_state_dict
from .record import ATTRIBUTE, Quantization, read_report

METHOD = "wush"


class WushHfConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model's config: its `Quantization` record, in the JSON of SPEC §7."""

    def __init__(self, **settings):
        settings.setdefault("quant_method", METHOD)
        self.quant_method = METHOD
        self.settings = settings  # as in config.json: what the digest was made from
        self.record = read_record(settings)

    @classmethod
    def of(cls, record: Quantization) -> "WushHfConfig":
        """The config of a model that was quantized in this process."""
        config = cls(**record.to_dict())
        config.record = record
        return config

    def to_dict(self) -> dict:
        return self.record.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()


class JoinRows(ConversionOps):
    """While loading: one buffer of a group from the tensors of its linears."""

    def __init__(self, group: WushGroup, buffer: str):
        self.group, self.buffer = group, buffer

    def __deepcopy__(self, memo: dict) -> "JoinRows":
        return self  # transformers copies converters; nothing here changes

    def convert(
        self,
        input_dict: Mapping,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs,
    ) -> dict[str, Tensor]:
        tensors = {_name(pattern): t[0] if isinstance(t, list) else t for pattern, t in input_dict.items()}
        return {full_layer_name: join_rows(self.group, self.buffer, tensors)}


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$"


def _name(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern[1:-1])


class WushHfQuantizer(HfQuantizer):
    """Loads checkpoints of quantized models and splits them for saving; `wush_compile.quantize` makes them."""

    requires_calibration = True

    def validate_environment(self, *args, **kwargs) -> None:
        """Nothing is needed but this library."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs
    ) -> None:
        config = self.quantization_config
        weights = Weights(checkpoint_files) if checkpoint_files else None
        if checkpoint_files:
            config.record.report = read_report(Path(checkpoint_files[0]).parent)
        groups = build_groups(model, config.record, weights and weights.specs)
        if weights is not None:
            self._check(model, groups, weights)
        for group in groups:
            install_group(model, group)
        # Resolved now: loading may run in threads, and afterwards buffers are no longer empty.
        self._converters = [
            WeightConverter([_pattern(name) for name, _ in pieces], f"{path}.{buffer}", [JoinRows(group, buffer)])
            for path, group in named_groups(model)
            for buffer, pieces in parts(group)
        ]

    def _check(self, model: PreTrainedModel, groups: list[WushGroup], weights: Weights) -> None:
        # transformers itself knows which other tensors may be missing or left over; shapes are ours to name.
        members = tuple(f"{m.name}." for group in groups for m in group.members)
        rest = {
            n: tuple(t.shape) for n, t in model.state_dict().items() if n in weights.specs and not n.startswith(members)
        }
        needed = group_specs(groups)
        found = {n: s for n, s in weights.specs.items() if n in rest or n in needed or n.startswith(members)}
        check_specs(found, groups, rest)
        weights.verify(self.quantization_config.settings, getattr(model.config, DIGEST, None))

    def update_weight_conversions(self, weight_conversions: list, *model) -> list:
        # The file has the names of the modules in memory, so the model's own renamings have nothing to do.
        return self._converters

    def get_weight_conversions(self) -> list[WeightConverter]:
        return self._converters

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        """Buffers of groups stay as saved, whatever dtype is asked for: rounding a transform again would spoil it."""
        joins = any(isinstance(op, JoinRows) for op in getattr(converter, "operations", ()))
        return None if joins else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        self._converters = []
        _adopt(model, self.quantization_config.record)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save_pretrained` writes, tied weights once; the digest of it goes into the model's config.

        (Not into the files' metadata: safetensors writes its entries in random order; equal models give equal bytes.)
        """
        state = dict(model.state_dict())
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        state = remove_tied_weights_from_state_dict(state, model)
        state = {n: load_offloaded_parameter(model, n) if t.is_meta else t for n, t in state.items()}
        state = split_state_dict(model, state)
        setattr(model.config, DIGEST, digest(self.quantization_config.to_dict(), state, state.__getitem__))
        return state, {}

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are: gradients pass through quantized linears

    @property
    def is_compileable(self) -> bool:
        return True


if METHOD not in AUTO_QUANTIZER_MAPPING:  # this file may be reloaded
    register_quantization_config(METHOD)(WushHfConfig)
    register_quantizer(METHOD)(WushHfQuantizer)
else:
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD], AUTO_QUANTIZER_MAPPING[METHOD] = WushHfConfig, WushHfQuantizer


def _adopt(model: PreTrainedModel, record: Quantization) -> None:
    setattr(model, ATTRIBUTE, record)
    # What get_state_dict_and_metadata returns has its final names: transformers has nothing to convert back.
    model._weight_conversions = []


def attach(model: nn.Module, record: Quantization) -> None:
    """Gives a quantized Hugging Face model its record, for `save_pretrained` to write; others only keep it."""
    setattr(model, ATTRIBUTE, record)
    if not isinstance(model, PreTrainedModel):
        return
    _adopt(model, record)
    config = WushHfConfig.of(record)
    model.config.quantization_config = config
    model.hf_quantizer = WushHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that `save_pretrained` writes of an unquantized model: tied weights once."""
    state = {n: t for n, t in model.state_dict().items() if n not in (model._keys_to_ignore_on_save or ())}
    return list(remove_tied_weights_from_state_dict(state, model))


def write_settings(model: PreTrainedModel, record: Quantization, directory: Path, sha256: str) -> None:
    """What `save_pretrained` writes of a quantized model beside its weights; `model` may be the unquantized one."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = WushHfConfig.of(record)
    setattr(config, DIGEST, sha256)
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def empty_hf_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model of a directory's `config.json` with its buffers and without its weights (meta device).

    `dtype` is taken where the configuration names none.
    """
    config = transformers.AutoConfig.from_pretrained(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{directory} is already quantized: start again from the original model")
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or dtype)
    model.tie_weights()  # the context above gives every name a tensor of its own
    if (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()


def load(directory: Path, config: Mapping, weights: Weights) -> PreTrainedModel:
    """The model of a checkpoint, exactly as saved; `checkpoint.load` calls it with what it has read."""
    name = config["architectures"][0]
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise CheckpointError(
            f"{directory} is of a {name}, which transformers does not have: load it with that "
            "class's from_pretrained, or as wush_compile.load(directory, model=...)"
        )
    model, info = kind.from_pretrained(directory, dtype="auto", use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:3])} of a {name}: copy or save it again")
    # transformers casts every float to the model's dtype; what was saved in another goes back to that.
    for name, tensor in model.state_dict().items():
        spec = weights.specs.get(name)
        if spec is not None and spec.dtype != tensor.dtype:
            model.get_parameter_or_buffer(name).data = weights.tensor(name).to(tensor.device, copy=True)
    return model
