"""What a group's transform does to its activations, as short curves for the report."""

import torch
from torch import Tensor

from .transforms import diagonal_blocks

# Values of a curve at most.
CURVE_POINTS = 48


def _curve(values: Tensor) -> list[float]:
    """At most `CURVE_POINTS` of the values over their mean, evenly spaced, largest first, with 4 digits."""
    values = values.flatten().sort(descending=True).values
    values = values / values.mean().clamp(min=1e-300)
    index = torch.linspace(0, len(values) - 1, min(CURVE_POINTS, len(values)), dtype=torch.float64).round().long()
    return [float(f"{value:.4g}") for value in values[index.to(values.device)].tolist()]


def moment_curves(h: Tensor, transform: Tensor | None, block: int) -> dict[str, list[float]]:
    """Curves of a group's second moment. h: undamped, float64 [K, K] or its blocks [K/B, B, B]; transform: T or None.

    before, after  power by channel, the diagonals of H and of T H Tᵀ (the paper's Figure 5)
    spectrum       eigenvalues of the blocks of T H Tᵀ: with WUSH's T, s by the power 2p of docs/spec.md §2
    """
    moment = diagonal_blocks(h, block)  # [K/B, B, B]
    after = moment
    if transform is not None:
        t = transform.to(moment.device, torch.float64)
        after = t @ moment @ t.mT
    spectrum = torch.linalg.eigvalsh(after).clamp(min=0)  # [K/B, B]
    diagonals = (m.diagonal(dim1=-2, dim2=-1) for m in (moment, after))
    before_power, after_power = map(_curve, diagonals)
    return {"before": before_power, "after": after_power, "spectrum": _curve(spectrum)}
