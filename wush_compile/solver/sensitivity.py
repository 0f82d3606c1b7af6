"""What an error of a group's input costs (docs/spec.md §2), from the gradients of the model's log-likelihood.

γ is the gradient by an input x, through the group's linears. An error e of x costs (γᵀ e)².
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import formats
from ..feedback import quantize
from ..recipe import Recipe
from .feedback import feedback_of

# Rows that are kept of all tokens.
ROWS = 64
# `W_bᵀW_b / N` weighs as much in S_b as so many tokens.
SHRINKAGE_TOKENS = 2048
# Factors of a transform within an octave.
FACTORS = 8
# A factor is worth it if the kept rows cost less than this share of what they cost without: among rows that differ, the
# best of eight costs a little less by chance alone.
WORTH = 0.5


def uses_sensitivity(recipe: Recipe) -> bool:
    """Whether the transform follows from it: where it has a closed form and activations have 4 bits."""
    return recipe.transform in ("wus", "wush") and recipe.activation_format == "same"


def _trace(m: Tensor) -> Tensor:
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


@dataclass
class Sensitivity:
    """moment float64 [K/B, B, B]: Σ ‖x‖² γ γᵀ over `tokens`. x, gradient fp32 [R, K]: those of largest ‖x‖ ‖γ‖."""

    moment: Tensor
    tokens: int
    x: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, x: Tensor, gradient: Tensor, tokens: int, block: int) -> "Sensitivity":
        """Of rows [n, K] of one micro-batch. Rows of zeros, which do not count, are no tokens."""
        x, gradient = x.to(torch.float32), gradient.to(torch.float32)
        rows = gradient * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        blocks = rows.unflatten(-1, (-1, block)).transpose(0, 1)  # [K/B, n, B]
        moment = (blocks.mT @ blocks).to(torch.float64)
        largest = torch.linalg.vector_norm(rows, dim=-1).topk(min(ROWS, len(rows))).indices
        return cls(moment, tokens, x[largest], gradient[largest])

    def cpu(self) -> "Sensitivity":
        """On the host."""
        return Sensitivity(self.moment.cpu(), self.tokens, self.x.cpu(), self.gradient.cpu())

    def joined(self, other: "Sensitivity | None") -> "Sensitivity":
        """Of the tokens of both."""
        if other is None:
            return self
        x, gradient = torch.cat([self.x, other.x]), torch.cat([self.gradient, other.gradient])
        size = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(gradient, dim=-1)
        largest = size.topk(min(ROWS, len(size))).indices
        return Sensitivity(self.moment + other.moment, self.tokens + other.tokens, x[largest], gradient[largest])

    def instead_of(self, gram: Tensor, blocks: slice = slice(None)) -> Tensor:
        """What stands for `gram`, S_b of the weights [b, B, B], and has its traces. No gradient reaches some blocks,
        and gradients by huge weights overflow when squared: there it is `gram`."""
        own = self.moment[blocks].to(gram.device)
        ratio = _trace(gram) / _trace(own)
        share = self.tokens / (self.tokens + SHRINKAGE_TOKENS)
        return torch.where(ratio.isfinite() & (ratio > 0), gram.lerp(own * ratio, share), gram)

    def factored(
        self, t: Tensor, gram: Tensor, recipe: Recipe, dtype: torch.dtype, blocks: slice = slice(None)
    ) -> Tensor:
        """T float64 [b, B, B], each block times the power of 2^(1/8), below 2, for which the kept rows cost least.

        `dtype` is the one that T will have; gram [b, B, B] is what stands for S_b. Only scales that are powers of two
        feel such a factor, and feedback does not.
        """
        if recipe.format != "mxfp4" or recipe.activation_scale_rule == "paper":
            return t
        x, gradient = (
            rows.to(t.device, torch.float64).unflatten(-1, (-1, t.shape[-1])).transpose(0, 1)[blocks]
            for rows in (self.x, self.gradient)
        )  # [b, R, B]
        feedback = None
        if recipe.rounds_with_feedback:
            inverse = torch.linalg.inv_ex(t).inverse
            feedback = feedback_of(inverse.mT @ gram @ inverse, recipe.group_size)
        tried = torch.stack([t * 2 ** (k / FACTORS) for k in range(FACTORS)])  # [8, b, B, B]
        costs = []
        for own in tried.to(dtype).to(torch.float64):
            values = (x @ own.mT).to(torch.float32)
            rows = values.transpose(0, 1).flatten(1)  # [R, b·B]
            codes, scales = quantize(rows, recipe.format, recipe.activation_scale_rule, None, feedback)
            rounded = formats.dequantize(codes, scales, recipe.format).unflatten(-1, (len(t), -1)).transpose(0, 1)
            # γ of the transformed input is T⁻ᵀ γ.
            price = torch.linalg.solve_ex(own, gradient, left=False).result
            costs.append(((rounded - values).to(torch.float64) * price).sum(-1).square().sum(-1))
        cost = torch.stack(costs).nan_to_num(nan=torch.inf)  # [8, b]
        best = torch.where(cost.amin(0) < WORTH * cost[0], cost.argmin(0), 0)  # [b]
        return tried[best, torch.arange(len(t), device=t.device)]
