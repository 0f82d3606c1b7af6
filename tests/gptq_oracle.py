"""GPTQ as in the papers, in float64: one channel at a time, with the inverse of the transformed Hessian."""

import torch

from wush_compile import formats


def obq(w, h, format, rule, g):
    """w [N, K], h [K, K] (damped) -> (codes uint8 [N, K], one a byte; scales [N, K/G]), last channel first.

    Optimal brain quantization in a fixed order: the error of channel j, over (H⁻¹)_jj, times row j of H⁻¹ is taken off
    the channels that remain; then channel j is eliminated from H⁻¹. Scales of a group follow from its weights as they
    are when its first channel comes up.
    """
    w = w.to(torch.float64).clone()
    inverse = torch.linalg.inv(h.to(torch.float64))
    n, k = w.shape
    group = formats.get_format(format).group_size
    codes = torch.zeros(n, k, dtype=torch.uint8)
    scales = torch.zeros(n, k // group, dtype=formats.get_format(format).scale_dtype)
    for j in range(k - 1, -1, -1):
        if (j + 1) % group == 0:
            members = w[:, j + 1 - group : j + 1].to(torch.float32)
            scales[:, j // group] = formats.compute_scales(members, format, rule, g)
        s = scales[:, j // group]
        codes[:, j] = formats.encode(w[:, j : j + 1].to(torch.float32), s, format, g)[:, 0]
        value = formats.decode(codes[:, j : j + 1], s, format)[:, 0].to(torch.float64)
        if g is not None:
            value = value / g.to(torch.float64)
        error = (w[:, j] - value) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, scales


def block_diagonal(transform, width):
    """Stored transform ([K/B, B, B], [1, B, B] or None) -> T, float64 [K, K]."""
    if transform is None:
        return torch.eye(width, dtype=torch.float64)
    t = transform.to(torch.float64)
    return torch.block_diag(*t.expand(width // t.shape[-1], -1, -1))


def order_of_channels(x, block):
    """Where GPTQ lays the channels of inputs x [n, K]: blocks by the sum of their squares, the least first."""
    power = x.to(torch.float64).square().sum(0).view(-1, block).sum(1).tolist()
    blocks = sorted(range(len(power)), key=power.__getitem__)
    return torch.cat([torch.arange(b * block, (b + 1) * block) for b in blocks])
