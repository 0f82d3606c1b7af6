"""How vLLM loads and computes quantized experts: two grouped products, a token quantized once before both.

On disk a layer's experts are two tensors of three dimensions, as transformers holds them. vLLM's own loader would look
for other names, so the layer gets a loader of ours.
"""

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..errors import CheckpointError
from ..experts import ExpertGroup
from ..kernels import facts
from ..modules import Member, buffer_layout
from .parameters import check_cut, replace

PRODUCTS = ("gate_up_proj", "down_proj")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}
OF_EXPERTS = ("weight_packed", "weight_scale", "weight_global_scale")


class WushExpertsMethod(FusedMoEMethodBase):
    """The experts of a layer. Tensor-parallel ranks cut the intermediate channels, expert-parallel ones the experts.

    groups   of `PRODUCTS`, in the record
    kept     a product -> its buffers, once they are loaded; CUDA graphs may be captured with them
    """

    def __init__(self, config, prefix: str, groups: list[int], moe):
        super().__init__(moe)
        self.config, self.prefix, self.groups = config, prefix, groups
        self.kept: dict[str, dict[str, Tensor]] = {}

    def maybe_roundup_sizes(self, hidden_size, intermediate_size_per_partition, *others) -> tuple[int, int]:
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        what = {
            f"activation {layer.activation.value}": layer.activation.value not in ACTIVATIONS,
            "biases": self.moe.has_bias,
            "weights of the router on the input": layer.apply_router_weight_on_input,
            "a limit of the activation": layer.swiglu_limit is not None,
        }
        if refused := [name for name, there in what.items() if there]:
            raise CheckpointError(
                f"{self.prefix}: the plug-in has no experts with {', '.join(refused)}: quantize the model again with "
                "the experts in `ignore`"
            )
        sizes = ((2 * intermediate_size_per_partition, hidden_size), (hidden_size, intermediate_size_per_partition))
        record, layer.wush_missing = self.config.record, set()
        for name, index, (rows, width) in zip(PRODUCTS, self.groups, sizes):
            entry = record.groups[index]
            recipe, block = record.recipe_of(entry), entry["transform_block_size"]
            whole = width if name == PRODUCTS[0] else width * self.moe.tp_size
            check_cut(f"{self.prefix}.{name}", max(block, recipe.group_size), width, whole)
            layout = buffer_layout(recipe, rows, width, block, params_dtype, False, num_experts)
            buffers = {key: None if of is None else torch.zeros(of[0], dtype=of[1]) for key, of in layout.items()}
            layer.wush_missing |= {f"{name}.{key}" for key, buffer in buffers.items() if buffer is not None}
            for buffer in buffers.values():
                if buffer is not None:
                    buffer.weight_loader_numel = 0  # vLLM must not wait for a loader of it when it loads again
            setattr(layer, name, ExpertGroup([Member(name, 0, rows, False)], recipe, block, buffers))
        layer.load_weights = functools.partial(self._load, layer)

    def _load(self, layer: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Loads tensors by their names on disk, behind the layer's; yields the names. Those that are loaded again are
        copied to the memory of the first ones: vLLM has put other tensors in their place, and puts them back."""
        for name, tensor in weights:
            product, _, key = name.partition(".")
            group = getattr(layer, product, None) if product in PRODUCTS else None
            target = self.kept[product].get(key) if product in self.kept else getattr(group, key, None)
            if target is None:
                raise CheckpointError(
                    f"{self.prefix} has no {name}: load the checkpoint into the model it was made from"
                )
            if key in OF_EXPERTS and layer.expert_map is not None:
                here = (layer.expert_map >= 0).nonzero().flatten()
                tensor = tensor[here[layer.expert_map[here].argsort()].to(tensor.device)]
            tensor = self._cut(tensor, target, product, key)
            if self.kept:
                replace(f"{self.prefix}.{name}", target, tensor)
                facts.refresh([target])
            else:
                setattr(group, key, tensor.to(target.device, copy=True))  # its dtype is that on disk
            layer.wush_missing.discard(name)
            yield name

    def _cut(self, tensor: Tensor, target: Tensor, product: str, key: str) -> Tensor:
        """A tensor-parallel rank's share of a tensor: of gate and up each its rows, of down its channels."""
        rank = self.moe.tp_rank
        if tensor.shape == target.shape:
            return tensor
        if key in ("input_transform", "input_feedback"):
            return tensor.narrow(0, rank * target.shape[0], target.shape[0])
        if product == PRODUCTS[1]:
            return tensor.narrow(-1, rank * target.shape[-1], target.shape[-1])
        rows = target.shape[1] // 2
        return torch.cat([half.narrow(1, rank * rows, rows) for half in tensor.chunk(2, dim=1)], dim=1)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.wush_missing and self.config.reads_tensors:
            missing = ", ".join(sorted(layer.wush_missing))
            raise CheckpointError(f"the checkpoint lacks {missing} of {self.prefix}: copy or save it again")
        self.kept = {name: dict(getattr(layer, name).named_buffers()) for name in PRODUCTS}

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, H], topk_weights and topk_ids [T, k] -> [T, H]; a rank's share of the sum."""
        first, second = (getattr(layer, name) for name in PRODUCTS)
        each, experts = topk_ids.shape[-1], first.experts
        ids = topk_ids.reshape(-1).to(torch.int64)  # [S]
        if layer.expert_map is not None:  # experts of other ranks come last, and their rows are zeros
            ids = layer.expert_map.to(torch.int64)[ids]
            ids = torch.where(ids < 0, experts, ids)
        expert, order = torch.sort(ids)
        offs = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).to(torch.int32)
        gate, up = first(x, offs, order // each).chunk(2, dim=-1)
        y = second(ACTIVATIONS[layer.activation.value](gate) * up, offs)  # [S, H]
        y = y * topk_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(-1, each, y.shape[-1]).sum(1).to(x.dtype)
