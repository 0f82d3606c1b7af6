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


def corrected(weight: Tensor, moment: Tensor, cross: Tensor, recipe: Recipe, name: str) -> Tensor:
    """W' [N, K] in the dtype and on the device of `weight` [N, K].

    moment, cross: sums over rows, X̂ᵀDX̂ and X̂ᵀD(X − X̂), fp32 [K, K]. Raises NonFiniteError for NaN or Inf in them.
    """
    h, c = (m.to(weight.device, torch.float64) for m in (moment, cross))
    if not (torch.isfinite(c).all() and torch.isfinite(h).all()):
        raise NonFiniteError(
            f"{name}: its calibration inputs, here or in the unquantized model, hold NaN or Inf, or overflow fp32 when "
            "squared; repair the data or the model, or put the layer in ignore"
        )
    factor, _ = damped_cholesky(h, recipe.damping, name)
    w = weight.T.to(torch.float64)  # Wᵀ [K, N]
    w = w + recipe.correction * torch.cholesky_solve(c @ w, factor)
    return w.T.to(weight.dtype).contiguous()
