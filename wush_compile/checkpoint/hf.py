"""`from_pretrained` and `save_pretrained` of Hugging Face transformers for quantized models.

Importing this file registers the quantization method "wush". Loading puts empty groups into the empty model, and joins
the rows of their linears while transformers reads them. Saving splits them again (docs/spec.md §7).
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.dynamic_module_utils import custom_object_save
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError
from ..modules import WushGroup, install_group, is_quantized, named_groups
from .files import DIGEST, Spec, Weights, digest
from .layout import (
    build_groups,
    check_specs,
    group_specs,
    join_rows,
    parts,
    read_record,
    replaces,
    split_state_dict,
)
from .names import Renaming, fitted, rename_members, up_to_date
from .patches import wrap_saving
from .record import ATTRIBUTE, Quantization, read_report

QUANT_METHOD = "wush"
# The key of config.json that names the file of the weights, and a file that is not there. transformers without our
# quantizer would skip the quantization and leave the layers random. So it stops, with this name as the reason.
FILE_KEY, NO_FILE = "transformers_weights", "install-wush-compile-to-load-this-checkpoint.safetensors"


def _marks(config: PreTrainedConfig) -> dict[str, str]:
    """What the `config.json` of a quantized model has besides its configuration."""
    return {FILE_KEY: NO_FILE} if isinstance(getattr(config, "quantization_config", None), WushHfConfig) else {}


def _unmarked(config: PreTrainedConfig) -> PreTrainedConfig:
    if getattr(config, FILE_KEY, None) == NO_FILE:
        delattr(config, FILE_KEY)
    return config


class WushHfConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model's config: its `Quantization` record, in the JSON of docs/spec.md §7."""

    def __init__(self, **settings):
        settings.setdefault("quant_method", QUANT_METHOD)
        self.quant_method = QUANT_METHOD
        self.settings = settings  # as in config.json, from which the digest was made
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
    """Joins one buffer of a group from the tensors of its linears, during loading."""

    def __init__(self, group: WushGroup, buffer: str, names: Renaming):
        self.group, self.buffer, self.names = group, buffer, names

    def __deepcopy__(self, memo: dict) -> "JoinRows":
        return self  # transformers copies converters; this one never changes

    def convert(
        self,
        input_dict: Mapping,
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs,
    ) -> dict[str, Tensor]:
        tensors = {
            self.names.in_model(_name(pattern)): t[0] if isinstance(t, list) else t for pattern, t in input_dict.items()
        }
        return {full_layer_name: join_rows(self.group, self.buffer, tensors)}


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$"


def _name(pattern: str) -> str:
    return re.sub(r"\\(.)", r"\1", pattern[1:-1])


class WushHfQuantizer(HfQuantizer):
    """Loads checkpoints of quantized models, and splits models for saving. `wush_compile.quantize` quantizes."""

    requires_calibration = True

    def validate_environment(self, *args, **kwargs) -> None:
        """This library needs nothing else."""

    def update_attn_implementation(self, config):
        return _unmarked(config)  # transformers looks for the files next

    def update_tp_plan(self, config):
        return _unmarked(config)  # the same place in version 5.17

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs
    ) -> None:
        config = self.quantization_config
        weights = Weights(checkpoint_files) if checkpoint_files else None
        if checkpoint_files:
            read_report(config.record, Path(checkpoint_files[0]).parent)
        config.record, names = fitted(config.record, model)
        specs = weights and {names.in_model(name) or name: spec for name, spec in weights.specs.items()}
        groups = build_groups(model, config.record, specs)
        if weights is not None:
            self._check(model, groups, specs)
            weights.verify(config.settings, getattr(model.config, DIGEST, None))
        for group in groups:
            install_group(model, group)
        # Resolved now, because loading may run in threads, and afterwards buffers are not empty.
        self._converters = [
            WeightConverter(
                [_pattern(names.on_disk(name)) for name, _ in pieces],
                f"{path}.{buffer}",
                [JoinRows(group, buffer, names)],
            )
            for path, group in named_groups(model)
            for buffer, pieces in parts(group)
        ]

    def _check(self, model: PreTrainedModel, groups: list[WushGroup], specs: Mapping[str, Spec]) -> None:
        # transformers itself reports other missing and unexpected tensors. Here the shapes are checked.
        replaced = replaces(groups)
        rest = {n: tuple(t.shape) for n, t in model.state_dict().items() if n in specs and not replaced(n)}
        needed = group_specs(groups)
        found = {n: s for n, s in specs.items() if n in rest or n in needed or replaced(n)}
        check_specs(found, groups, rest)

    def update_weight_conversions(self, weight_conversions: list, *model) -> list:
        # Files have the names of the modules in memory, so the model's own renamings are not needed.
        return self._converters

    def get_weight_conversions(self) -> list[WeightConverter]:
        return self._converters

    def get_new_dtype(self, converter, param, dtype: torch.dtype | None) -> torch.dtype | None:
        """Buffers of groups keep their saved dtype whatever dtype is asked for: no transform is rounded twice."""
        joins = any(isinstance(op, JoinRows) for op in getattr(converter, "operations", ()))
        return None if joins else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        self._converters = []
        model.config.quantization_config = self.quantization_config  # transformers has copied the configuration
        _adopt(model, self.quantization_config.record)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that `save_pretrained` writes, tied weights once. Their digest goes into the model's config.

        It does not go into the files' metadata, because safetensors writes metadata in random order and equal models
        give equal bytes.
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


# Not by transformers' decorators, which refuse a name that is there already: of wush_compile_autoload, or of this file
# before it was reloaded.
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD], AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = WushHfConfig, WushHfQuantizer


def _adopt(model: PreTrainedModel, record: Quantization) -> None:
    setattr(model, ATTRIBUTE, record)
    # get_state_dict_and_metadata returns final names, so transformers must convert nothing back.
    model._weight_conversions = []


def _unties(model: PreTrainedModel, record: Quantization) -> bool:
    """Whether the head is quantized, and so no longer the embedding's parameter."""
    head, members = model.get_output_embeddings(), {name for entry in record.groups for name in entry["members"]}
    return head is not None and any(module is head and name in members for name, module in model.named_modules())


def _untie(config: transformers.PretrainedConfig) -> None:
    """Says in a model's configuration that no weight is tied: its head is quantized."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def attach(model: nn.Module, record: Quantization) -> None:
    """Gives a quantized model its record. `save_pretrained` of a Hugging Face model writes the record."""
    setattr(model, ATTRIBUTE, record)
    if not isinstance(model, PreTrainedModel):
        return
    _adopt(model, record)
    if _unties(model, record):
        _untie(model.config)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    config = WushHfConfig.of(record)
    model.config.quantization_config = config
    model.hf_quantizer = WushHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True


def _detach(model: nn.Module) -> None:
    """Takes back what `attach` gave, because the record of a larger model replaces this one's."""
    owners = [vars(model), *([vars(model.config)] if isinstance(model, PreTrainedModel) else [])]
    for own in owners:
        for name in (ATTRIBUTE, "hf_quantizer", "is_quantized", "quantization_method", "quantization_config", DIGEST):
            own.pop(name, None)


def bring_up_to_date(model: nn.Module) -> Quantization:
    """The record of a model as it is now (`names.up_to_date`), which the model gets.

    Raises `CheckpointError`, and leaves all as it is, if no record fits or if the model's configuration makes another
    model than this one.
    """
    record = up_to_date(model)
    if record is not getattr(model, ATTRIBUTE, None):
        if isinstance(model, PreTrainedModel):
            _check_configuration(model, record)
        for module in model.modules():
            if module is not model and ATTRIBUTE in vars(module):
                _detach(module)
        rename_members(model)
        attach(model, record)
    return record


def _check_configuration(model: PreTrainedModel, record: Quantization) -> None:
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    try:
        with init_empty_weights():
            made = type(model)._from_config(config)
    except Exception:  # whatever its __init__ raises: then only load(directory, model=...) can read the checkpoint
        return
    in_groups = tuple(f"{path}." for path, _ in named_groups(model))
    ours = {n: Spec(tuple(t.shape), t.dtype) for n, t in model.state_dict().items() if not n.startswith(in_groups)}
    try:
        replaced = replaces(build_groups(made, record))
        check_specs(ours, [], {n: tuple(t.shape) for n, t in made.state_dict().items() if not replaced(n)})
    except CheckpointError as error:
        raise CheckpointError(
            f"this {type(model).__name__} is not the one that its configuration makes, and could not be loaded again "
            f"({str(error).partition(':')[0]}): change model.config too, such as num_hidden_layers"
        ) from None


def _prepare(model: PreTrainedModel) -> None:
    # With an adapter loaded, save_pretrained writes the adapter alone.
    if is_quantized(model) and not getattr(model, "_hf_peft_config_loaded", False):
        bring_up_to_date(model)


wrap_saving(_prepare, _marks)


def saved_names(model: PreTrainedModel) -> list[str]:
    """Names of the tensors that `save_pretrained` writes for an unquantized model, tied weights once."""
    state = {n: t for n, t in model.state_dict().items() if n not in (model._keys_to_ignore_on_save or ())}
    return list(remove_tied_weights_from_state_dict(state, model))


def write_settings(model: PreTrainedModel, record: Quantization, directory: Path, sha256: str) -> None:
    """Writes what `save_pretrained` writes beside the weights. `model` may be the unquantized one."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if _unties(model, record):
        _untie(config)
    config.quantization_config = WushHfConfig.of(record)
    setattr(config, DIGEST, sha256)
    if model.is_remote_code():
        custom_object_save(model, directory, config=config)
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def class_named(architectures: object) -> type[PreTrainedModel] | None:
    """The transformers class that `architectures` of a `config.json` names first; None if transformers lacks it."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _class_of(directory: Path, config: Mapping) -> type[PreTrainedModel]:
    """The transformers class that a checkpoint's `config.json` names."""
    kind, names = class_named(config.get("architectures")), config.get("architectures")
    if not names:
        raise CheckpointError(
            f"{directory} does not name the class of its model: load it with "
            "wush_compile.load(directory, model=...) and an unquantized model of the same kind"
        )
    if kind is None:
        raise CheckpointError(
            f"{directory} holds a {names[0]}, which transformers does not have: load it with that "
            "class's from_pretrained, or with wush_compile.load(directory, model=...)"
        )
    return kind


def empty_quantized(
    directory: Path, config: Mapping, record: Quantization, specs: Mapping[str, Spec]
) -> PreTrainedModel:
    """The quantized Hugging Face model of a checkpoint on the meta device, with the dtypes of `specs`, without weights.

    `config`, `record` and `specs` (of the tensors on disk, by name) are those of the directory.
    """
    kind = _class_of(directory, config)
    settings = _unmarked(kind.config_class.from_pretrained(directory))
    del settings.quantization_config
    with init_empty_weights(include_buffers=True):
        model = kind._from_config(settings, dtype=settings.dtype)
    model.tie_weights()  # above, every name got a tensor of its own
    for group in build_groups(model, record, specs):
        install_group(model, group)
    for name, tensor in model.state_dict().items():
        if name in specs and specs[name].dtype != tensor.dtype:
            empty = torch.empty_like(tensor, dtype=specs[name].dtype, device="meta")
            model.get_parameter_or_buffer(name).data = empty
    attach(model, record)
    return model.eval()


def load(directory: Path, config: Mapping, weights: Weights, dtype: torch.dtype | None, **where) -> PreTrainedModel:
    """The Hugging Face model of a checkpoint, exactly as saved if `dtype` is None.

    `config` and `weights` are those of the directory, and `where` has arguments of `from_pretrained`.
    """
    kind = _class_of(directory, config)
    model, info = kind.from_pretrained(
        directory, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True, **where
    )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{directory} lacks {', '.join(missing[:3])} of a {kind.__name__}: copy or save it again")
    if left := sorted(info["unexpected_keys"]):
        raise CheckpointError(f"{directory} has {', '.join(left[:3])}, which no {kind.__name__} has: save it again")
    # transformers casts every float tensor to the model's dtype. Tensors saved in another dtype get it back.
    for name, tensor in model.state_dict().items() if dtype is None else ():
        spec = weights.specs.get(name)
        if spec is not None and spec.dtype != tensor.dtype and not tensor.is_meta:
            model.get_parameter_or_buffer(name).data = weights.tensor(name).to(tensor.device, copy=True)
    return model
