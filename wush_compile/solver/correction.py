"""Weights that make up for the groups in front of them (docs/spec.md §3; GPTAQ, arXiv 2504.02692; Qronos, 2505.11695).

A group's input is X in the unquantized model and X̂ in the one that is quantized so far. With weights of tokens D,

    W' = W + a · W Aᵀ,    A = (X̂ᵀDX̂ + λ)⁻¹ X̂ᵀD(X − X̂)

have for a = 1 the output closest to X Wᵀ. a is the recipe's `correction`.
"""

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..recipe import Recipe
from .transforms import damped_cholesky

# Rows of a moment that are widened to float64 at a time.
ROWS = 1024


def corrected(weight: Tensor, moment: Tensor, cross: Tensor, recipe: Recipe, name: str) -> Tensor:
    """W' [N, K] in the dtype and on the device of `weight` [N, K].

    moment, cross: sums over rows, X̂ᵀDX̂ and X̂ᵀD(X − X̂), fp32 [K, K]. Raises NonFiniteError for NaN or Inf in them.
    """
    if not (torch.isfinite(cross).all() and torch.isfinite(moment).all()):
        raise NonFiniteError(
            f"{name}: its calibration inputs, here or in the unquantized model, hold NaN or Inf, or overflow fp32 when "
            "squared; repair the data or the model, or put the layer in ignore"
        )

    def wide(m: Tensor) -> Tensor:
        return m.to(weight.device, torch.float64, copy=True)

    w = wide(weight.T)  # Wᵀ [K, N]
    right = torch.cat([wide(rows) @ w for rows in cross.split(ROWS)])  # X̂ᵀD(X − X̂) Wᵀ [K, N]
    factor, _ = damped_cholesky(wide(moment), recipe.damping, name, again=lambda: wide(moment))
    w += recipe.correction * torch.cholesky_solve(right, factor)
    return w.T.to(weight.dtype).contiguous()
