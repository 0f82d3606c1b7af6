"""The rotation of T for rounding with feedback, and the numbers of feedback (docs/spec.md §2, §4)."""

import torch
from torch import Tensor

from ..feedback import STEPS, by_channel, by_step
from .transforms import hadamard_matrix

# Of the mean cost, added to each. A direction in which errors cost next to nothing could take up any error; but what is
# added to a value before it is rounded makes its own error larger, and clips it. With 1e-4 for both, layers of 24
# outputs had 28 to 75 times the loss of rounding to nearest; tests/test_feedback.py has layers of this kind.
DAMPING, ROTATION_DAMPING = 0.05, 0.3


def equal_steps(d: Tensor) -> Tensor:
    """d > 0 [.., n] -> orthogonal Q [.., n, n] for which Q diag(d) Qᵀ = RᵀR, R upper with an equal diagonal.

    The geometric mean decomposition (Jiang, Hager, Li 2005): a rotation of two values makes the first the mean of all.
    """
    mean, index = d.log().mean(-1).exp(), torch.arange(d.shape[-1], device=d.device)
    d, q = d.clone(), torch.eye(d.shape[-1], dtype=d.dtype, device=d.device).expand(*d.shape, -1)
    for k in range(d.shape[-1] - 1):
        # A value on the other side of the mean comes next to value k.
        rest = d[..., k:]
        other = k + torch.where(rest[..., 0] >= mean, rest.argmin(-1), rest.argmax(-1))[..., None]  # [.., 1]
        order = torch.where(index == k + 1, other, torch.where(index == other, k + 1, index))  # [.., n]
        d, q = d.gather(-1, order), q.gather(-2, order[..., None].expand_as(q))
        one, two = d[..., k], d[..., k + 1]
        share = torch.where(one == two, 1.0, (mean - two) / (one - two)).clamp(0, 1)
        c, s = share.sqrt()[..., None], (1 - share).sqrt()[..., None]
        first, second = q[..., k, :], q[..., k + 1, :]
        q = torch.cat(
            [q[..., :k, :], torch.stack([c * first + s * second, c * second - s * first], -2), q[..., k + 2 :, :]], -2
        )
        d = torch.cat([d[..., :k], torch.stack([mean, one * two / mean], -1), d[..., k + 2 :]], -1)
    return q


def rotation(d: Tensor) -> Tensor:
    """d [b, B], what an error along each singular vector costs, of the largest value first -> Q [b, B, B].

    Q stands for Had in T. In each quadruple of values it makes the four steps equally dear, and Had of B/4 spreads
    each quadruple over the channels of a step. Quadruples take ranks k, B/2 − 1 − k, B/2 + k and B − 1 − k, so that
    they are alike.
    """
    count = d.shape[-1] // STEPS
    k = torch.arange(count, device=d.device)
    ranks = torch.stack([k, 2 * count - 1 - k, 2 * count + k, 4 * count - 1 - k], -1)  # [n, 4]
    d = d.clamp(min=0)
    mean = d.mean(-1, keepdim=True)
    d = torch.where(mean > 0, d + ROTATION_DAMPING * mean, 1.0)
    steps = equal_steps(d[:, ranks])  # [b, n, 4 steps, 4 values]
    spread = torch.einsum("wk,bkst->sbktw", hadamard_matrix(count).to(d), steps)  # [4, b, n, 4, n]
    return by_channel(spread).flatten(1, 2)[:, ranks.flatten().argsort()].mT  # [b, B, B]


def feedback_of(cost: Tensor, group: int) -> Tensor:
    """S̃ float64 [K/B, B, B] -> feedback bf16 [K/G, 6, G/4]. G divides B.

    Within a step S̃ becomes diagonal by Had of n = G/4: for each of its n frequencies there is a matrix of 4 x 4 steps.
    """
    per, count = cost.shape[-1] // group, group // STEPS
    blocks = cost.unflatten(1, (per, group)).unflatten(3, (per, group)).diagonal(dim1=1, dim2=3)  # [K/B, G, G, B/G]
    blocks = blocks.movedim(-1, 1).flatten(0, 1)  # [K/G, G, G]
    had, channels = hadamard_matrix(count).to(cost), by_step(torch.arange(group, device=cost.device))
    blocks = blocks[:, channels[:, :, None, None], channels]  # [K/G, 4, n, 4, n]
    matrix = torch.einsum("wk,bswtv,vk->bkst", had, blocks, had)  # [K/G, n, 4, 4]
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean((-1, -2))[:, None, None, None]
    eye = torch.eye(STEPS).to(cost)
    matrix = torch.where(mean > 0, matrix / mean, 0.0) + DAMPING * eye
    lower, failed = torch.linalg.cholesky_ex(matrix)
    # Without damping T may be so near to singular that S̃ is rounded to a matrix that costs cannot have: no feedback.
    root = torch.where(failed[..., None, None] == 0, lower, eye).mT  # upper R, matrix = Rᵀ R
    ratio = root / root.diagonal(dim1=-2, dim2=-1)[..., None]  # F_su of each frequency
    f = torch.stack([ratio[..., s, u] for u in range(1, STEPS) for s in range(u)], 1)  # [K/G, 6, n]
    # The first row of Had_n diag(f) Had_n.
    return (f @ had / count**0.5).to(torch.bfloat16).contiguous()
