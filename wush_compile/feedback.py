"""Rounding with feedback: 4-bit activations are rounded in four steps, and each step takes up the errors of those
before it (docs/spec.md §4).

An error e of a transformed group costs eᵀ S̃ e, S̃ = T⁻ᵀ S_b T⁻¹. S̃ is not diagonal: an error of one channel can undo a
part of another's. With S̃ = Rᵀ R, R block-upper-triangular over the steps, the cost is the sum over steps s of

    ‖R_ss (e_s + Σ_{u>s} F_su e_u)‖²        F_su = R_ss⁻¹ R_su

So step s rounds x_s − Σ_{u>s} F_su e_u: GPTQ, for activations, inside a group. The last step comes first.

T of WUSH makes S̃ = Had diag(d) Hadᵀ, of which entry (c, c') depends on c xor c' alone. So does F_su. Its numbers are
the tensor `feedback` bf16 [K/G, 6, G/4]: F_su[w, w'] = feedback[b, u(u−1)/2 + s, w xor w'].
"""

import torch
from torch import Tensor

from . import formats

STEPS = 4
PAIRS = STEPS * (STEPS - 1) // 2
FORMATS = ("mxfp4", "nvfp4")
# Groups with larger values are rounded to nearest: sums of errors could overflow.
LARGEST = 2.0**100


def shape(format: str, width: int) -> tuple[int, int, int]:
    """The shape of `feedback` for inputs of `width` channels: [K/G, 6, G/4]."""
    group = formats.get_format(format).group_size
    return width // group, PAIRS, group // STEPS


def by_step(x: Tensor) -> Tensor:
    """Groups [.., G] -> [4, .., G/4]: channel c is in step ⌊c/4⌋ mod 4, at place 4·⌊c/16⌋ + c mod 4."""
    return x.unflatten(-1, (-1, STEPS, 4)).movedim(-2, 0).flatten(-2)


def by_channel(steps: Tensor) -> Tensor:
    """The way back: [4, .., G/4] -> [.., G]."""
    return steps.unflatten(-1, (-1, 4)).movedim(0, -2).flatten(-3)


def _xor(size: int, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    return index[:, None] ^ index  # [n, n]


def matrices(feedback: Tensor) -> list[Tensor]:
    """[K/G, 6, n] -> for each step s the fp32 matrix [K/G, (3 − s)·n, n] of all F_suᵀ, u = s + 1 first."""
    every = feedback.to(torch.float32)[..., _xor(feedback.shape[-1], feedback.device)]  # [K/G, 6, n, n], symmetric
    return [
        torch.cat([every[:, u * (u - 1) // 2 + s] for u in range(s + 1, STEPS)], 1) if s < STEPS - 1 else every[:, :0]
        for s in range(STEPS)
    ]


def values_to_round(x: Tensor, scales: Tensor, format: str, g: Tensor | None, feedback: Tensor) -> Tensor:
    """Groups x fp32 [M, K/G, G] with scales [M, K/G] -> what their codes are the nearest of, fp32 [M, K/G, G].

    Errors are rounded to bf16 before they are multiplied. A group with a magnitude of 2^100 or more, with NaN or Inf
    keeps its values.
    """
    unit = formats.decode_scales(scales, format)  # [M, K/G]
    inverse = 1 / unit if g is None else g.reshape(()) / unit
    unit = unit if g is None else unit * (1 / g.reshape(()))
    unit, inverse = (t.transpose(0, 1)[..., None] for t in (unit, inverse))  # [K/G, M, 1]
    small = (x.abs().amax(-1) < LARGEST).transpose(0, 1)[..., None]  # NaN is not small
    steps = by_step(x.transpose(0, 1))  # [4, K/G, M, n]
    found, errors = [None] * STEPS, []
    for s, matrix in reversed(list(enumerate(matrices(feedback)))):
        z = steps[s]
        if errors:
            z = torch.where(small, z - torch.bmm(torch.cat(errors, -1), matrix), z)
        found[s] = z
        error = formats.e2m1_round(z * inverse) * unit - steps[s]
        error = torch.where(small, error, 0.0).to(torch.bfloat16).to(torch.float32)
        errors.insert(0, error)
    return by_channel(torch.stack(found)).transpose(0, 1)  # [M, K/G, G]


def quantize(x: Tensor, format: str, rule: str, g: Tensor | None, feedback: Tensor | None) -> tuple[Tensor, Tensor]:
    """`formats.quantize` of x [.., K] with feedback bf16 [K/G, 6, G/4]; None: rounded to nearest."""
    if feedback is None:
        return formats.quantize(x, format, rule, g)
    groups = x.to(torch.float32).unflatten(-1, (-1, formats.get_format(format).group_size))  # [.., K/G, G]
    scales = formats.compute_scales(groups, format, rule, g)  # [.., K/G]
    z = values_to_round(groups.flatten(0, -3), scales.flatten(0, -2), format, g, feedback).view(groups.shape)
    return formats.pack(formats.encode(z, scales, format, g).flatten(-2)), scales
