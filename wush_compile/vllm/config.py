"""What a checkpoint says about each layer of vLLM's model. A layer that is quantized in part is an error."""

import weakref

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from ..checkpoint.fused import FUSED
from ..checkpoint.layout import read_record
from ..checkpoint.record import Quantization
from ..errors import CheckpointError
from . import refused_release

DRAFT = "draft_model."  # vLLM puts it in front of the names of a model that proposes tokens for another


class WushVllmConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint, as vLLM asks for it.

    record    how the model was quantized (docs/spec.md §7)
    group_of  name of a linear, as vLLM's model names it -> index of its group in `record.groups`
    heads     name of an embedding that looks up the rows of a quantized head -> index of the head's group
    found     those of `heads` that vLLM's model has
    holders   index of a group -> the layer that loads the group's transform. It is the layer of the first member;
              other layers take the transform from there.
    reads_tensors   whether the weights come from the checkpoint, tensor by tensor
    """

    def __init__(self, record: Quantization):
        super().__init__()
        self.record = record
        self.group_of = {name: index for index, group in enumerate(record.groups) for name in group["members"]}
        self.heads = {name: i for i, group in enumerate(record.groups) for name in group.get("embeddings", ())}
        self.found: set[str] = set()
        self.reads_tensors = True
        self.holders: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    # It is pickled to the workers, before there are layers. A dictionary of weak references cannot be.
    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "holders"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self.holders = weakref.WeakValueDictionary()

    @classmethod
    def get_name(cls) -> str:
        return "wush"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # other devices, and what no kernel takes, run the reference

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict) -> "WushVllmConfig":
        """Raises `CheckpointError` for a release of vLLM or a checkpoint that this library does not know."""
        if reason := refused_release():
            raise CheckpointError(reason)
        return cls(read_record(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Renames the linears as the model class renames the tensors of its checkpoints (vision-language models)."""
        for names in (self.group_of, self.heads):
            renamed = {hf_to_vllm_mapper.map_name(name) or name: index for name, index in names.items()}
            names.clear()
            names.update(renamed)

    def first_member(self, group: int) -> str:
        """The member under whose name the group's transform is on disk, as vLLM's model names it."""
        return next(name for name, index in self.group_of.items() if index == group)

    def holder(self, group: int) -> nn.Module:
        """The layer that loads a group's transform."""
        if group not in self.holders:
            raise CheckpointError(
                f"other layers read tensors of {self.first_member(group)}, which vLLM's model does not have in this "
                "process: use pipeline_parallel_size=1"
            )
        return self.holders[group]

    def members_of(self, prefix: str) -> list[str]:
        """The linears on disk that a linear of vLLM's model consists of, in the order of its rows."""
        parent, dot, leaf = prefix.rpartition(".")
        packed = FUSED | self.packed_modules_mapping
        if prefix in self.group_of or leaf not in packed:
            return [prefix]
        return [f"{parent}{dot}{name}" for name in packed[leaf]]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM loads and computes a layer. Raises `CheckpointError` for one that is quantized in part."""
        from vllm.config import get_current_vllm_config_or_none
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        prefix = prefix.removeprefix(DRAFT)
        names = self.members_of(prefix)
        groups = [self.group_of.get(name) for name in names]
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return self._embedding(prefix)
        if type(layer).__name__ == "RoutedExperts":
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        if None not in groups:
            from .linear import WushLinearMethod
            from .passes import enable

            current = get_current_vllm_config_or_none()
            if current is not None:
                self.reads_tensors = current.load_config.load_format in ("auto", "hf", "safetensors")
            enable()
            return WushLinearMethod(self, prefix, names, groups)
        if left := [name for name, group in zip(names, groups) if group is None and any(g is not None for g in groups)]:
            raise CheckpointError(
                f"vLLM runs {', '.join(names)} as one linear, and the checkpoint leaves {', '.join(left)} in 16 bits: "
                "quantize the model again, and ignore all of them or none"
            )
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _embedding(self, prefix: str) -> QuantizeMethodBase | None:
        """The method of an embedding. Some model classes (Llama's) do not tell its name; then there is but one."""
        name = prefix or next(iter(self.heads), "")
        if name not in self.heads:
            return None
        from .linear import WushEmbeddingMethod

        self.found.add(name)
        return WushEmbeddingMethod(self, self.heads[name])

    def _experts(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer's experts. Raises `CheckpointError` for some that vLLM cannot run."""
        from .experts import PRODUCTS, WushExpertsMethod

        inside = [name for name in self.group_of if name.startswith(f"{prefix}.")]
        products = [f"{prefix}.{name}" for name in PRODUCTS]
        if not inside:
            return None
        if sorted(inside) != sorted(products):
            raise CheckpointError(
                f"{prefix}: the plug-in runs experts whose {' and '.join(PRODUCTS)} are both quantized, and the "
                f"checkpoint quantizes {', '.join(inside[:3])}: quantize the model again with the experts in `ignore`"
            )
        return WushExpertsMethod(self, prefix, [self.group_of[name] for name in products], layer.moe_config)
