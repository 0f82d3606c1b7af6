"""Sweeps after GPTQ: each group of each row is rounded anew, given all others (docs/spec.md §3).

GPTQ rounds a channel when those in front of it are not rounded yet, and never comes back. A sweep is block coordinate
descent on the same loss, tr(D H̃ Dᵀ): for each group, from the last to the first, the best weights given the errors of
all other channels are rounded as GPTQ rounds a group. A row keeps the result only if its loss falls.

As in GPTQ errors pass from group to group inside a span, and to the other spans in one matrix product a span.
"""

import torch
from torch import Tensor

from .. import formats
from .gptq import SPAN, add_product_, by_weight, group_rounder, round_best, side_by_side

# The least gain, a share of the group's loss: equal codes may seem to differ by the rounding of sums.
GAIN = 1e-9
# Entries of the gradient that are computed at a time.
GRADIENT_ELEMENTS = 2**24


def sweep_(
    w: Tensor,
    unit: Tensor,
    diagonal: Tensor,
    format: str,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
    sweeps: int,
    span: int = SPAN,
) -> None:
    """Changes codes, scales and error in place so that the loss of no row grows; overwrites `unit`.

    w float64 [K, N]: W̃ᵀ; unit [K, K] and diagonal [K]: U and d, U diag(d) the lower factor of H̃. codes uint8 [N, K],
    one a byte; scales [N, K/G]; error float64 [K, N]: W̃ᵀ − Q(W̃)ᵀ. Of E weights side by side as in `gptq`: E·N for N,
    unit [E, K, K], diagonal [E, K], g [E].
    """
    group, round_one = formats.FORMATS[format].group_size, group_rounder(w.device)
    each = w.shape[1] if unit.dim() == 2 else w.shape[1] // len(unit)
    root = unit.tril_().mul_(diagonal[..., None, :])  # L̃ [.., K, K]
    gradient = torch.empty_like(error)  # H̃ Dᵀ, half of the loss's gradient by the error [K, N]
    step = max(1, GRADIENT_ELEMENTS // len(w))
    for own, *pair in zip(root.view(-1, *root.shape[-2:]), gradient.split(each, 1), error.split(each, 1), strict=True):
        for part, rows in zip(*(t.split(step, 1) for t in pair), strict=True):
            part.copy_(own @ (own.T @ rows))
    for sweep in range(sweeps):
        for stop in range(w.shape[0], 0, -span):
            first = max(0, stop - span)
            inside = slice(first, stop)
            columns = root[..., :stop] @ root[..., inside, :stop].mT  # H̃ of the span [.., K, S]
            square, old = columns[..., inside, :], error[inside].clone()
            for start in range(stop - group, first - 1, -group):
                here, local = slice(start, start + group), slice(start - first, start - first + group)
                lower = torch.linalg.cholesky_ex(square[..., local, local]).L  # [.., G, G]
                own = lower.diagonal(dim1=-2, dim2=-1)
                # The group's error is off its best value, given the others, by H̃_gg⁻¹ gradient.
                off = side_by_side(torch.cholesky_solve(by_weight(gradient[here], root), lower))  # [G, N]
                best = (w[here] - error[here]).add_(off)  # the weights that leave no gradient
                found = torch.empty_like(best, dtype=torch.uint8), scales.new_empty(w.shape[1]), torch.empty_like(best)
                unit_lower = lower / own[..., None, :]
                if rule == "loss":
                    round_best(best, best.clone(), unit_lower, own, format, g, *found, round_one)
                else:
                    round_one(best, best.clone(), unit_lower, format, rule, g, *found, each)
                # [N], the group's loss
                before, after = (side_by_side(lower.mT @ by_weight(e, root)).square_().sum(0) for e in (off, found[2]))
                better = after < before * (1 - GAIN)
                change = torch.where(better, found[2] - off, 0.0)  # of the error [G, N]
                codes[:, here] = torch.where(better, found[0], codes[:, here].T).T
                scales[:, start // group] = torch.where(better, found[1], scales[:, start // group])
                error[here] += change
                add_product_(gradient[inside], square[..., local], change)
            change = old.neg_().add_(error[inside])  # of the span [S, N]
            add_product_(gradient[:first], columns[..., :first, :], change)
            if sweep + 1 < sweeps:
                add_product_(gradient[stop:], columns[..., stop:, :], change)
