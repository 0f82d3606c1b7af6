"""Which transform each block of a group gets (SPEC §2), and from which moments (SPEC §3)."""

import torch
from torch import Tensor

from ..recipe import Recipe
from .transforms import (
    damped_cholesky,
    diagonal_blocks,
    hadamard_matrix,
    random_orthogonal,
    round_transform,
    wush_transform,
)

CLOSED_FORM = ("wus", "wush")


def uses_conditional_moments(recipe: Recipe) -> bool:
    """Whether transforms follow from the Cholesky factor of the whole second moment: only closed-form ones do."""
    return recipe.moments == "conditional" and recipe.transform in CLOSED_FORM


class Transforms:
    """The transforms of one group, each rounded to the model dtype and with the float64 inverse of what is stored."""

    def __init__(self, recipe: Recipe, h: Tensor | None, block: int, dtype: torch.dtype, name: str):
        """h: the undamped second moment, float64 [K, K] or [K/B, B, B]; None will do unless T has a closed form."""
        self.recipe, self.block, self.dtype, self.name = recipe, block, dtype, name
        self.damping_tries = 0
        if recipe.transform in CLOSED_FORM:
            self.h = diagonal_blocks(h, block)  # [K/B, B, B]
            self.dead = self.h.diagonal(dim1=-2, dim2=-1).sum(-1) == 0  # [K/B]

    def all(self, w: Tensor, factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Every block's from the original weights: Wᵀ float64 [K, N] -> (T, T⁻¹), [K/B, B, B] or [1, B, B]; or Nones.

        factor [K, K]: L of the damped H, whose diagonal blocks are roots of the conditional moments; None: each block's
        own moment, damped by itself.
        """
        kind = self.recipe.transform
        if kind == "identity":
            return None, None
        if kind == "hadamard":
            t = hadamard_matrix(self.block)[None]
            return round_transform(t.to(w.device), self.dtype, self.name)
        if kind == "random":
            t = random_orthogonal(w.shape[0] // self.block, self.block, self.recipe.seed, self.name)
            return round_transform(t.to(w.device), self.dtype, self.name)
        if factor is None:
            roots, self.damping_tries = damped_cholesky(self.h, self.recipe.damping, self.name)
        else:
            roots = diagonal_blocks(factor, self.block)
        return self._closed_form(roots, w.unflatten(0, (-1, self.block)), self.dead)

    def one(self, b: int, factor: Tensor, updated: Tensor) -> tuple[Tensor, Tensor]:
        """Block b's from its conditional moment and its updated weights [B, N] -> (T, T⁻¹), [1, B, B] (Algorithm 2)."""
        here = slice(b * self.block, (b + 1) * self.block)
        return self._closed_form(factor[here, here][None], updated[None], self.dead[b : b + 1])

    def _closed_form(self, roots: Tensor, w: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
        """roots [b, B, B]; w [b, B, N]; dead [b]: blocks whose inputs are all zero."""
        gram = torch.where(dead[:, None, None], 0.0, w @ w.mT / w.shape[-1])
        t = wush_transform(roots, gram, self.recipe.damping, hadamard=self.recipe.transform == "wush")
        return round_transform(t, self.dtype, self.name)
