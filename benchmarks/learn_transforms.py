"""A few gradient steps on all transforms of a model at once, from those that it was solved with.

T = (I + A) T₀, A = 0 at first, so that T stays near T₀ and invertible. The loss is the KL of the unquantized model's
predictions to those of a model whose linears compute `Q(x Tᵀ) Q(W T⁻¹)ᵀ` with weights rounded to nearest. A gradient
passes a quantizer as if an error were in proportion to the root mean square of its group: with a constant error a
larger T would cost nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wush_compile import formats
from wush_compile.modules import WushGroup
from wush_compile.ops.core import block_transform

# Sequences of a step.
SEQUENCES = 4


def passed(x: Tensor, group_size: int, quantize: Callable[[Tensor], Tensor], share: float = 1.0) -> Tensor:
    """x fp32 [.., K] plus `share` of its rounding error, which grows with the groups of x."""
    with torch.no_grad():
        error = (quantize(x) - x) * share
    size = x.unflatten(-1, (-1, group_size)).square().mean(-1, keepdim=True).clamp(min=1e-30).sqrt()
    growth = size / size.detach()
    return x + (error.unflatten(-1, (-1, group_size)) * growth).flatten(-2)


class Learned(nn.Module):
    """The linears of a group, with a transform that learns. weight [N, K]: stacked."""

    def __init__(self, group: WushGroup, weight: Tensor, share: float):
        super().__init__()
        self.format, self.rule, self.share = group.format, group.scale_rule, share
        self.weight_rule = "mse"
        self.register_buffer("start", group.input_transform.float())
        self.register_buffer("back", torch.linalg.inv(group.input_transform.double()).float())
        self.register_buffer("weight", weight)
        self.g, self.weight_g = group.input_global_scale, group.weight_global_scale
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.members, self.served, self.kept = len(group.members), 0, None

    def transform(self) -> Tensor:
        """T fp32 [K/B, B, B]."""
        return self.start + self.change @ self.start

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x̂ [.., K] and Ŵ [N, K] in x's dtype, computed once for all members."""
        if self.served == 0:
            size = formats.FORMATS[self.format].group_size

            def quantizer(rule: str, g: Tensor | None) -> Callable[[Tensor], Tensor]:
                def quantize(values: Tensor) -> Tensor:
                    return formats.dequantize(*formats.quantize(values, self.format, rule, g), self.format, g)

                return quantize

            eye = torch.eye(self.start.shape[-1], device=x.device)
            inverse = self.back @ torch.linalg.inv(eye + self.change)  # T⁻¹
            moved = passed(block_transform(x, self.transform()), size, quantizer(self.rule, self.g))
            weight = block_transform(self.weight, inverse.mT)  # W T⁻¹, by blocks
            weight = passed(weight, size, quantizer(self.weight_rule, self.weight_g), self.share)
            self.kept = moved.to(x.dtype), weight.to(x.dtype)
        self.served = (self.served + 1) % self.members
        kept = self.kept
        if self.served == 0:
            self.kept = None
        return kept


class LearnedLinear(nn.Module):
    """A row range of a `Learned`."""

    def __init__(self, group: Learned, start: int, stop: int, bias: Tensor | None):
        super().__init__()
        self.group, self.start, self.stop, self.bias = [group], start, stop, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [.., K] -> [.., stop - start]."""
        moved, weight = self.group[0].operands(x)
        return nn.functional.linear(moved, weight[self.start : self.stop], self.bias)


def learn(
    reference: nn.Module, model: nn.Module, solved: nn.Module, data: list[Tensor], steps: int, rate: float, share: float
) -> dict[str, Tensor]:
    """Transforms by the names of their groups' first members.

    reference: the unquantized model; model: a copy of it, which is changed; solved: the quantized one; data: token ids
    [b, S]. `share` of the weights' rounding errors counts: GPTQ's errors cost less than those of rounding to nearest.
    """
    learned = {}
    for group in {id(m): m for m in solved.modules() if isinstance(m, WushGroup)}.values():
        linears = [model.get_submodule(member.name) for member in group.members]
        own = Learned(group, torch.cat([linear.weight.detach() for linear in linears]), share)
        learned[group.members[0].name] = own
        for member, linear in zip(group.members, linears, strict=True):
            parent, _, leaf = member.name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LearnedLinear(own, member.start, member.stop, linear.bias))
    model.requires_grad_(False)
    parameters = [own.change for own in learned.values()]
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    sequences = torch.cat(list(data))
    generator = torch.Generator().manual_seed(0)
    first = last = 0.0
    for step in range(steps):
        for own in learned.values():
            own.served, own.kept = 0, None
        ids = sequences[torch.randperm(len(sequences), generator=generator)[:SEQUENCES].to(sequences.device)]
        with torch.no_grad():
            target = reference(ids, use_cache=False).logits.float().log_softmax(-1)
        found = model(ids, use_cache=False).logits.float().log_softmax(-1)
        loss = (target.exp() * (target - found)).sum(-1).mean()
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.nan_to_num(gradient)
        optimizer.step()
        first += loss.item() if step < 10 else 0
        last += loss.item() if step >= steps - 10 else 0
    print(f"KL of the first 10 steps {first / 10:.4f}, of the last {last / 10:.4f}", flush=True)
    return {name: own.transform().detach() for name, own in learned.items()}
