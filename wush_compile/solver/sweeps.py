"""Sweeps after GPTQ: each group of each row is rounded anew, given all others (docs/spec.md §3).

GPTQ rounds a channel when those in front of it are not rounded yet, and never comes back. A sweep is block coordinate
descent on the same loss, tr(D H̃ Dᵀ): for each group, from the last to the first, the best weights given the errors of
all other channels are rounded as GPTQ rounds a group. A row keeps the result only if its loss falls.
"""

import torch
from torch import Tensor

from .. import formats
from .gptq import group_rounder, round_best

# The least gain, a share of the group's loss: equal codes may seem to differ by the rounding of sums.
GAIN = 1e-9


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
) -> None:
    """Changes codes, scales and error in place so that the loss of no row grows; overwrites `unit`.

    w float64 [K, N]: W̃ᵀ; unit [K, K] and diagonal [K]: U and d, U diag(d) the lower factor of H̃. codes uint8 [N, K],
    one a byte; scales [N, K/G]; error float64 [K, N]: W̃ᵀ − Q(W̃)ᵀ.
    """
    group, round_one = formats.FORMATS[format].group_size, group_rounder(w.device)
    root = unit.tril_().mul_(diagonal)  # L̃
    gradient = root @ (root.T @ error)  # H̃ Dᵀ, half of the loss's gradient by the error [K, N]
    for _ in range(sweeps):
        for start in range(w.shape[0] - group, -1, -group):
            here, stop = slice(start, start + group), start + group
            columns = root[:, :stop] @ root[here, :stop].T  # H̃ [K, G]
            lower = torch.linalg.cholesky_ex(columns[here]).L  # [G, G]
            own = lower.diagonal()
            # The group's error is off its best value, given the others, by H̃_gg⁻¹ gradient.
            off = torch.cholesky_solve(gradient[here], lower)  # [G, N]
            best = (w[here] - error[here]).add_(off)  # the weights that leave no gradient
            found = torch.empty_like(best, dtype=torch.uint8), scales.new_empty(w.shape[1]), torch.empty_like(best)
            round_here = best, best.clone(), lower / own
            if rule == "loss":
                round_best(*round_here, own, format, g, *found, round_one)
            else:
                round_one(*round_here, format, rule, g, *found)
            before, after = ((lower.T @ e).square_().sum(0) for e in (off, found[2]))  # [N], the group's part of the loss
            better = after < before * (1 - GAIN)
            change = torch.where(better, found[2] - off, 0.0)  # of the error [G, N]
            codes[:, here] = torch.where(better, found[0], codes[:, here].T).T
            scales[:, start // group] = torch.where(better, found[1], scales[:, start // group])
            error[here] += change
            gradient.addmm_(columns, change)
