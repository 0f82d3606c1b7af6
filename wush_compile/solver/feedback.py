"""The numbers of rounding with feedback (`wush_compile/feedback.py`), from what errors cost."""

import torch
from torch import Tensor

from ..feedback import STEPS, by_step
from .transforms import hadamard_matrix

# Of the mean of d, added to d: a direction in which errors cost nothing could take up any error.
DAMPING = 1e-4


def column_order(size: int) -> Tensor:
    """Which column of Had each singular value goes to, from the largest on: int64 [B], B at least 16.

    The steps are told apart by bits 2 and 3 of a channel's number. The values that feedback plays off against each
    other are those whose columns differ in these two bits. So the two highest bits of a value's rank become bits 3 and
    2 of its column, and the four are as far apart as they can be.
    """
    rank, low = torch.arange(size), size // 4
    rest = rank % low  # the rank's other bits; the last two stay, those above make room
    return rest // 4 * 16 + rank // low * 4 + rest % 4


def feedback_of(cost: Tensor, group: int) -> Tensor:
    """S̃ float64 [K/B, B, B] -> feedback bf16 [K/G, 6, G/4]. G divides B."""
    had = hadamard_matrix(group).to(cost.device)
    per, count = cost.shape[-1] // group, group // STEPS
    blocks = cost.unflatten(1, (per, group)).unflatten(3, (per, group)).diagonal(dim1=1, dim2=3)  # [K/B, G, G, B/G]
    blocks = blocks.movedim(-1, 1).flatten(0, 1)  # [K/G, G, G]
    d = (had @ blocks @ had).diagonal(dim1=-2, dim2=-1).clamp(min=0)  # [K/G, G]
    mean = d.mean(-1, keepdim=True)
    d = torch.where(mean > 0, d / mean, 1.0) + DAMPING
    # Within a step S̃ is diagonal after a Hadamard transform of n = G/4 channels: for each of its n frequencies there is
    # a matrix of 4 x 4 steps.
    small = hadamard_matrix(STEPS).to(d)
    matrix = small @ torch.diag_embed(by_step(d).movedim(0, -1)) @ small  # [K/G, n, 4, 4]
    root = torch.linalg.cholesky(matrix).mT  # upper R, matrix = Rᵀ R
    ratio = root / root.diagonal(dim1=-2, dim2=-1)[..., None]  # F_su of each frequency
    f = torch.stack([ratio[..., s, u] for u in range(1, STEPS) for s in range(u)], 1)  # [K/G, 6, n]
    # The first row of Had_n diag(f) Had_n.
    return (f @ hadamard_matrix(count).to(f) / count**0.5).to(torch.bfloat16).contiguous()
