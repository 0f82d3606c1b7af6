"""How vLLM loads and computes a quantized linear: one quantizer and one product for each group that it has rows of.

And an embedding that looks up the rows of a quantized head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import BasevLLMParameter

from ..errors import CheckpointError
from ..formats import dequantize
from ..kernels import facts
from ..modules import buffer_layout, feedback_arguments
from ..recipe import Recipe
from .parameters import Factors, GlobalScales, Rows, check_cut, forwarded, load_whole, replace

BY_ROWS = ("weight_packed", "weight_scale")
OF_INPUT = ("input_transform", "input_global_scale", "input_feedback")
BUFFERS = (*BY_ROWS, "weight_global_scale", *OF_INPUT)


class Part(NamedTuple):
    """The rows of one group in a linear of vLLM.

    suffix    of the names of its parameters; none if the linear has one part
    members   numbers of its linears on disk, among those of vLLM's linear
    """

    suffix: str
    group: int
    recipe: Recipe
    block: int
    members: list[int]


@register_weight_loader_v2_supported_method
class WushLinearMethod(LinearMethodBase):
    """A linear of vLLM's model, which may be several linears on disk.

    config   the checkpoint's; it knows where the transforms are
    names    the linears on disk, in the order of their rows
    groups   the group of each
    loaders  of the parameters that were created
    kept     the parameters that the layer runs with, from the first load on. CUDA graphs may be captured with them, so
             weights that are loaded again are copied to them.
    """

    def __init__(self, config, prefix: str, names: list[str], groups: list[int]):
        self.config, self.prefix, self.names = config, prefix, names
        self.loaders: dict[str, Callable[..., None]] = {}
        self.kept: dict[str, Parameter] = {}
        distinct, record = list(dict.fromkeys(groups)), config.record
        self.parts = [
            Part(
                f"_{i}" if len(distinct) > 1 else "",
                group,
                record.recipe_of(record.groups[group]),
                record.groups[group]["transform_block_size"],
                [member for member, other in enumerate(groups) if other == group],
            )
            for i, group in enumerate(distinct)
        ]

    # -- loading -----------------------------------------------------------------------------------------------------

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        # A linear that is fused on disk (Phi-3) is one member, whatever its partitions.
        sizes = output_partition_sizes if len(self.names) > 1 else [sum(output_partition_sizes)]
        if len(sizes) != len(self.names):
            raise CheckpointError(
                f"{self.prefix}: vLLM cuts it into {len(sizes)} parts, and the checkpoint holds "
                f"{', '.join(self.names)}: the plug-in does not know which rows are whose"
            )
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        layer.wush_rows = [(start, start + size) for start, size in zip(starts, sizes)]
        self.expected: dict[str, int] = {}
        loader, names = extra_weight_attrs["weight_loader"], []
        for part in self.parts:
            step = max(part.block, part.recipe.group_size)
            check_cut(self.prefix, step, input_size_per_partition, input_size)
            names += self._create_part(layer, part, sizes, input_size_per_partition, params_dtype, loader)
        if len(self.parts) > 1:
            for name in dict.fromkeys(names):
                param = forwarded(lambda member, name=name: self._target(layer, name, member))
                # vLLM counts the elements that it loads again by the parameter that has the loader.
                inner = [getattr(layer, name + part.suffix, None) for part in self.parts]
                param.weight_loader_numel = sum(p.numel() for p in inner if p is not None)
                for p in inner:
                    if p is not None:
                        p.weight_loader_numel = 0
                layer.register_parameter(name, param)
        self.missing = dict(self.expected)

    def _create_part(self, layer, part: Part, sizes: list[int], width: int, dtype: torch.dtype, loader) -> list[str]:
        """Registers the parameters of a part; returns the names of its tensors on disk."""
        rows = [sizes[member] for member in part.members]
        layout = buffer_layout(part.recipe, sum(rows), width, part.block, dtype, False)
        starts = None
        if part.suffix:
            starts = {member: sum(rows[:i]) for i, member in enumerate(part.members)}
        if self.config.first_member(part.group) in self.names:
            self.config.holders[part.group] = layer
        else:
            layout |= dict.fromkeys(OF_INPUT)  # another layer has them
        loaders = {name: load_whole(layer.tp_rank) for name in OF_INPUT}
        for name in BUFFERS:
            if layout[name] is None:
                continue
            (shape, kind), load = layout[name], self._counting(name + part.suffix, loaders.get(name, loader))
            self.loaders[name + part.suffix] = load
            if name in BY_ROWS:
                data = torch.zeros(shape, dtype=kind)
                param = Rows(data=data, input_dim=1, output_dim=0, weight_loader=load, starts=starts)
                self.expected[name + part.suffix] = len(rows)
            elif name == "weight_global_scale" and kind == torch.bfloat16:
                data = torch.ones(shape, dtype=kind)
                param = Factors(data=data, output_dim=0, weight_loader=load, starts=starts)
                self.expected[name + part.suffix] = len(rows)
            elif name == "weight_global_scale":
                data = torch.ones(len(rows), dtype=kind)
                param = GlobalScales(data=data, weight_loader=load, members=part.members)
                self.expected[name + part.suffix] = len(rows)
            else:
                param = BasevLLMParameter(data=torch.zeros(shape, dtype=kind), weight_loader=load)
                self.expected[name + part.suffix] = 1
            layer.register_parameter(name + part.suffix, param)
        return [name for name in BUFFERS if layout[name] is not None]

    def _counting(self, name: str, load: Callable[..., None]) -> Callable[..., None]:
        """`load`, which also counts the tensors that are still to come for this parameter."""

        def run(param, loaded_weight: Tensor, *shard_id) -> None:
            load(param, loaded_weight, *shard_id)
            self.missing[name] -= not param.is_meta  # where vLLM only counts

        return run

    def _target(self, layer: nn.Module, name: str, member: int):
        """(parameter, its loader) for a tensor of a member, in a linear of several parts."""
        part = next(part for part in self.parts if member in part.members)
        param = getattr(layer, name + part.suffix, None)
        if param is None:
            raise CheckpointError(
                f"{self.names[member]}.{name} is in the checkpoint, and its recipe has no such tensor: "
                "config.json was edited; quantize the model again"
            )
        return param, self.loaders[name + part.suffix]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        # vLLM's attention in bf16 computes in AMX's tiles. It leaves it to the products of oneDNN to ask the system for
        # them, and here none may run before it: the process would end by an illegal instruction.
        if torch.cpu._is_amx_tile_supported():
            torch.cpu._init_amx()
        self._finish(layer)
        for name, group in self.config.heads.items():
            if name not in self.config.found and any(part.group == group for part in self.parts):
                raise CheckpointError(
                    f"{name} looks up the rows of {self.prefix}, and vLLM's model has no such embedding: "
                    "quantize the model again without `head`"
                )
        for part in self.parts:
            holder = self.config.holder(part.group)
            if holder is not layer:  # (Phi: fc1 reads what q, k and v read)
                holder.quant_method.lend(holder, part.group, layer, part.suffix)

    def lend(self, layer: nn.Module, group: int, borrower: nn.Module, suffix: str, names=OF_INPUT) -> Part:
        """Gives another layer what this one holds of a group, by default what its input is quantized with.

        Both get the same parameters, so that a compiled graph sees that both quantize alike.
        """
        if not self.kept:  # else its weights may be still to come, when they are loaded again
            self._finish(layer)
        own = next(part for part in self.parts if part.group == group)
        for name in names:
            setattr(borrower, name + suffix, self.kept.get(name + own.suffix))
        return own

    def _finish(self, layer: nn.Module) -> None:
        """Makes plain parameters of those that were loaded, or copies them to those of the first load. Does nothing
        where nothing was loaded."""
        params = {n: p for n, p in layer.named_parameters(recurse=False) if isinstance(p, BasevLLMParameter)}
        params = {name: param for name, param in params.items() if name.startswith(BUFFERS)}
        if not params:
            return
        missing, self.missing = self.missing, dict(self.expected)
        if self.config.reads_tensors and any(count > 0 for count in missing.values()):
            names = ", ".join(name for name, count in missing.items() if count > 0)
            raise CheckpointError(f"the checkpoint lacks {names} of {self.prefix}: copy or save it again")
        again = bool(self.kept)
        for name, param in params.items():
            delattr(layer, name)
            if param.numel() == 0:  # it handed its tensors on
                continue
            data = param.data[:1] if isinstance(param, GlobalScales) else param.data  # members have copies
            if isinstance(param, Factors):
                data = data.masked_fill(data == 0, 1)  # vLLM pads a head with zeros, and rows are divided by these
            if again:
                replace(f"{self.prefix}.{name}", self.kept[name].data, data)
            else:
                self.kept[name] = Parameter(data, requires_grad=False)
            layer.register_parameter(name, self.kept[name])
        if again:
            facts.refresh(self.kept.values())

    # -- running -----------------------------------------------------------------------------------------------------

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [.., K] -> [.., N] in x's dtype."""
        if len(self.parts) == 1:
            return self._product(layer, self.parts[0], x, bias)
        outputs: dict[int, Tensor] = {}
        for part in self.parts:
            rows = [layer.wush_rows[member] for member in part.members]
            own = None if bias is None else torch.cat([bias[start:stop] for start, stop in rows])
            y = self._product(layer, part, x, own)
            outputs |= dict(zip(part.members, y.split([stop - start for start, stop in rows], dim=-1)))
        return torch.cat([outputs[member] for member in range(len(self.names))], dim=-1)

    def _product(self, layer: nn.Module, part: Part, x: Tensor, bias: Tensor | None) -> Tensor:
        recipe = part.recipe
        weight, weight_scale, weight_global_scale, transform, global_scale, feedback = [
            getattr(layer, name + part.suffix, None) for name in BUFFERS
        ]
        codes, scales = torch.ops.wush.transform_quantize(
            x, transform, global_scale, recipe.operand, recipe.operand_rule, *feedback_arguments(feedback)
        )
        return torch.ops.wush.fp4_linear(
            codes,
            scales,
            global_scale,
            weight,
            weight_scale,
            weight_global_scale,
            bias,
            None,
            recipe.format,
            x.dtype,
            *(() if recipe.activation_format == "same" else ("rows", recipe.operand)),
        )


class WushEmbeddingMethod(QuantizeMethodBase):
    """An embedding that looks up the rows of a quantized head, to which it is tied."""

    def __init__(self, config, group: int):
        self.config, self.group = config, group

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        layer.wush_dtype = params_dtype

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        head = self.config.holder(self.group)
        names = (*BY_ROWS, "weight_global_scale")
        layer.wush_format = head.quant_method.lend(head, self.group, layer, "", names).recipe.format

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """ids [..] -> [.., K] in the model's dtype."""
        codes, scales = F.embedding(input_, layer.weight_packed), F.embedding(input_, layer.weight_scale)
        rows, g = dequantize(codes, scales, layer.wush_format), layer.weight_global_scale
        if g is not None:
            rows = rows / (g[input_][..., None] if g.dtype == torch.bfloat16 else g)
        return rows.to(layer.wush_dtype)

    def apply(self, layer: nn.Module, *args, **kwargs) -> Tensor:
        raise NotImplementedError("an embedding has no product")
