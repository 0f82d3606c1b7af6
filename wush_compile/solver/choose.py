"""Chooses the transform of each block of a group (docs/spec.md §2) and the moments that it follows from (§3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..recipe import Recipe
from .feedback import feedback_of, rotation
from .order import out_of_order
from .sensitivity import Sensitivity, uses_sensitivity
from .transforms import (
    damped_cholesky,
    diagonal_blocks,
    hadamard_matrix,
    random_orthogonal,
    round_transform,
    wush_transform,
)

CLOSED_FORM = ("wus", "wush")
# The power of s in T, by the activations' format (docs/spec.md §2). 1/2 is eq. 7, where both sides get the same second
# moment; 1 would give weights the moment I. On SmolLM2 (docs/notebook/accuracy.md) 7/8 has 7 % less KL than 1/2 for fp8
# and 16 bits with MXFP4 weights, and 3 % less with NVFP4 weights. For 4 bits 5/8 has 1 to 3 % less there. It had 20 %
# more error on an encoder, by the chance that the factor of T now takes away (same page): worth another measurement.
POWER = {"same": 0.5, "fp8": 0.875, None: 0.875}
# The same where activations are rounded with feedback. It takes up errors in directions where they are cheap, so that
# their size follows the geometric mean of what they cost: activations may be closer to white, and weights less so. On
# SmolLM2, three calibration sets each (benchmarks/trial_rotation.py), NVFP4 has the KL .1391 with 1/2, .1371 with 7/16,
# .1362 with 3/8; MXFP4 has .2230, .2216 and .2213.
FEEDBACK_POWER = {"mxfp4": 0.4375, "nvfp4": 0.375}


def power_of_s(recipe: Recipe) -> float:
    """The power of s in T of a closed form."""
    power = POWER[recipe.activation_format]
    return FEEDBACK_POWER.get(recipe.format, power) if recipe.rounds_with_feedback else power


def uses_conditional_moments(recipe: Recipe) -> bool:
    """Whether transforms follow from the Cholesky factor of the whole second moment. Only closed forms can."""
    return recipe.moments == "conditional" and recipe.transform in CLOSED_FORM


def block_gram(w: Tensor, block: int) -> Tensor:
    """Wᵀ, float64 [K, N] -> S of each block, W_bᵀW_b / N: [K/B, B, B]."""
    blocks = w.unflatten(0, (-1, block))
    return blocks @ blocks.mT / w.shape[-1]


class Transforms:
    """The transforms of one group: each rounded to the model dtype, with the float64 inverse of the rounded one.

    cost   S̃ = T⁻ᵀ S_b T⁻¹ of each block, float64 [K/B, B, B], for rounding with feedback; None without it
    """

    def __init__(
        self,
        recipe: Recipe,
        h: Tensor | None,
        block: int,
        dtype: torch.dtype,
        name: str,
        sensitivity: Sensitivity | None = None,
    ):
        """h: the undamped second moment, float64 [K, K] or [K/B, B, B]. None is enough unless T has a closed form."""
        self.sensitivity = sensitivity if uses_sensitivity(recipe) else None
        self.recipe, self.block, self.dtype, self.name = recipe, block, dtype, name
        self.damping_tries = 0
        self.cost: Tensor | None = None
        if recipe.transform in CLOSED_FORM:
            self.h = diagonal_blocks(h, block)  # [K/B, B, B]
            self.dead = self.h.diagonal(dim1=-2, dim2=-1).sum(-1) == 0  # [K/B]
            if recipe.rounds_with_feedback:
                self.cost = torch.zeros_like(self.h)

    def feedback(self) -> Tensor | None:
        """The numbers of rounding with feedback, bf16 [K/G, 6, G/4], for the transforms that were found last."""
        return None if self.cost is None else feedback_of(self.cost, self.recipe.group_size)

    def all(self, w: Tensor, factor: Tensor | None, order: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The transforms of all blocks, from the original weights.

        w: Wᵀ, float64 [K, N], its blocks in `order`; everything else is in the model's. factor [K, K]: L of the damped
        H, whose diagonal blocks are square roots of the conditional moments. Without a factor each block has its own
        moment, damped by itself. Returns (T, T⁻¹), each [K/B, B, B], or [1, B, B] if all blocks share one; (None, None)
        for `identity`.
        """
        return self.of_gram(w.shape[0], w.device, lambda: out_of_order(block_gram(w, self.block), order), factor)

    def of_gram(
        self, width: int, device: torch.device, gram: Callable[[], Tensor], factor: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """As `all`, for weights of which `gram` computes `block_gram`, where the transform depends on them."""
        kind = self.recipe.transform
        if kind == "identity":
            return None, None
        if kind == "hadamard":
            t = hadamard_matrix(self.block)[None]
            return round_transform(t.to(device), self.dtype, self.name)
        if kind == "random":
            t = random_orthogonal(width // self.block, self.block, self.recipe.seed, self.name)
            return round_transform(t.to(device), self.dtype, self.name)
        if factor is None:
            roots, self.damping_tries = damped_cholesky(self.h, self.recipe.damping, self.name)
        else:
            roots = diagonal_blocks(factor, self.block)
        return self._closed_form(roots, gram(), slice(None))

    def one(self, b: int, factor: Tensor, updated: Tensor) -> tuple[Tensor, Tensor]:
        """(T, T⁻¹) of block b, each [1, B, B], from its conditional moment and updated weights [B, N] (Algorithm 2)."""
        here = slice(b * self.block, (b + 1) * self.block)
        return self._closed_form(factor[here, here][None], block_gram(updated, self.block), slice(b, b + 1))

    def _closed_form(self, roots: Tensor, gram: Tensor, blocks: slice) -> tuple[Tensor, Tensor]:
        """roots [b, B, B] of the moments; gram [b, B, B]; blocks: which they are."""
        if self.sensitivity is not None:
            gram = self.sensitivity.instead_of(gram, blocks)
        gram = torch.where(self.dead[blocks, None, None], 0.0, gram)
        hadamard, power = self.recipe.transform == "wush", power_of_s(self.recipe)
        turn = None if self.cost is None else rotation
        t = wush_transform(roots, gram, self.recipe.damping, hadamard, power, turn)
        if self.sensitivity is not None:
            t = self.sensitivity.factored(t, gram, self.recipe, self.dtype, blocks)
        t, inverse = round_transform(t, self.dtype, self.name)
        if self.cost is not None:
            self.cost[blocks] = inverse.mT @ gram @ inverse
        return t, inverse
