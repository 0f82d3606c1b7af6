"""Quantized experts at run time: a `WushExperts` for each mixture of experts, an `ExpertGroup` for each product of it.

The module of a model that holds its experts as 3-D parameters is told by what transformers sets on it: `num_experts`,
`has_gate`, `has_bias` and `is_transposed`. Its two products are grouped: rows in the order of experts, offsets between
them. `ExpertGroup` takes the place of the parameter whose product it computes, under its name. A token is quantized
once, before it is copied to its experts.
"""

import contextlib

import torch
from torch import Tensor, nn

from .modules import WushGroup, needs_gradient
from .ops import grouped as grouped_ops  # noqa: F401  (registers wush::fp4_grouped_linear)
from .ops.straight_through import ExpertsStraightThrough

# `scale_layout` and `activation_format` of the op, where a group's layout is empty.
DEFAULTS = ("rows", "same")
MARKS = ("num_experts", "has_gate", "has_bias", "is_transposed")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the way of transformers."""
    return all(hasattr(module, mark) for mark in MARKS)


def products_of(experts: nn.Module) -> tuple[str, str]:
    """The names of the two parameters that are multiplied in a module of experts, in their order."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class ExpertGroup(WushGroup):
    """One product of all experts of a layer, quantized: E weights of one shape that share one transform.

    `buffer_layout` describes the buffers, weight_packed [E, N, K/2] for one. The only member is named like the
    parameter that it replaces, and has the rows of one expert.
    """

    @property
    def experts(self) -> int:
        """The number of experts E."""
        return self.weight_packed.shape[0]

    def forward(self, x: Tensor, offs: Tensor, token: Tensor | None = None) -> Tensor:
        """x [S, K], the rows in the order of experts, or the tokens [T, K] with token int64 [S] -> [S, N].

        offs   int32 [E], the ends of the experts' rows
        """
        trains = needs_gradient(x)
        with torch.no_grad() if trains else contextlib.nullcontext():
            codes, scales = self.quantize_input(x)
        if trains:
            return ExpertsStraightThrough.apply(
                x,
                codes,
                scales,
                self.input_transform,
                self.input_global_scale,
                self.weight_packed,
                self.weight_scale,
                self.weight_global_scale,
                offs,
                self.bias,
                self.format,
                self.layout,
                token,
            )
        return torch.ops.wush.fp4_grouped_linear(
            codes,
            scales,
            self.input_global_scale,
            self.weight_packed,
            self.weight_scale,
            self.weight_global_scale,
            offs,
            self.bias,
            self.format,
            x.dtype,
            *(self.layout or DEFAULTS),
            token,
        )

    def install(self, model: nn.Module) -> None:
        """Puts the group into the model, in place of the parameter of its name, which is freed, with its bias."""
        [member] = self.members
        path, _, leaf = member.name.rpartition(".")
        experts = model.get_submodule(path)
        if not isinstance(experts, WushExperts):
            experts = WushExperts(experts)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, experts)
        for name in (leaf, f"{leaf}_bias"):
            experts._parameters.pop(name, None)
        setattr(experts, leaf, self)


class WushExperts(nn.Module):
    """The experts of a layer with quantized products. It has what else the module had: activation, sizes, norms.

    kind   the class of the module that it replaces, which knows how a gate is applied
    """

    def __init__(self, old: nn.Module):
        super().__init__()
        hooked = ("forward", "_old_forward", "_hf_hook")  # accelerate's, which hold the old weights
        vars(self).update({name: value for name, value in vars(old).items() if name not in hooked})
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(self, own, dict(getattr(old, own)))
        self.kind = type(old)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, k] and top_k_weights [T, k] -> [T, H].

        The steps and their dtypes are those of transformers' grouped forward.
        """
        first, second = (getattr(self, name) for name in products_of(self))
        each = top_k_index.shape[-1]
        expert, order = torch.sort(top_k_index.reshape(-1))  # [S]
        numbers = torch.arange(self.num_experts, device=expert.device, dtype=expert.dtype)
        offs = torch.searchsorted(expert, numbers, right=True).to(torch.int32)  # [E]
        y = first(hidden_states, offs, order // each)
        y = self.kind._apply_gate(self, y) if self.has_gate else self.act_fn(y)
        y = second(y, offs)  # [S, H]
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return y[back].view(-1, each, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, from {self.kind.__name__}"

    def unquantized(self, dtype: torch.dtype) -> nn.Module:
        """A module of the class that this one replaces, with empty products on the meta device."""
        plain = self.kind.__new__(self.kind)
        vars(plain).update({name: value for name, value in vars(self).items() if name != "kind"})
        for own in ("_parameters", "_buffers", "_modules"):
            setattr(plain, own, dict(getattr(self, own)))
        for name in products_of(self):
            experts, rows, width = plain._modules.pop(name).shape
            shape = (experts, width, rows) if self.is_transposed else (experts, rows, width)
            sizes = {name: shape} | ({f"{name}_bias": (experts, rows)} if self.has_bias else {})
            for parameter, size in sizes.items():
                setattr(plain, parameter, nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), False))
        return plain
