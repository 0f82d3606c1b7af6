"""GPTQ in the transformed basis, as Babai's nearest plane (SPEC §3): no inverse of H, rows side by side.

With H = L Lᵀ (L lower) the loss of an error D [N, K] is ‖D L‖², and column j of D L depends on channels ≥ j only. Going
from the last channel to the first, the value that would make column j zero, given what is already quantized, is
w_j + A_j / L_jj with A_j = Σ_{i>j} d_i L_ij; it is rounded, and its own error enters the A of the channels before it.

In the transformed basis W̃ = W T⁻¹, D = D̃ T. T L is block lower triangular, and T_b L_bb = L̃_b Qᵀ with L̃_b lower and
Q orthogonal; so ‖D L‖ of block b is ‖D̃_b L̃_b + A_b Q‖: within a block everything happens in these rotated
coordinates, between blocks the errors are kept in the original ones. All is float64, transposed to [channels, rows].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import formats


def quantize_block(
    w: Tensor, a: Tensor, factor: Tensor, format: str, rule: str, g: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One transform block.

    w [B, N]: W̃_bᵀ; a [B, N]: (A_b Q)ᵀ, the residual that the later blocks left; factor [B, B]: L̃_b; all float64.
    Returns codes uint8 [N, B], one a byte; scales [N, B/G]; the error W̃ᵀ − Q(W̃)ᵀ, float64 [B, N].
    """
    size, group = w.shape[0], formats.FORMATS[format].group_size
    diagonal = factor.diagonal()
    unit_factor = factor / diagonal                                         # U: L̃ = U diag(L̃)
    offset = a / diagonal[:, None]
    # z_j is what gets rounded at channel j: w_j + A_j / L̃_jj. Rows of z stay as they were rounded.
    z = w + offset
    error = torch.empty_like(w)
    scales = [None] * (size // group)
    for start in range(size - group, -1, -group):
        members = slice(start, start + group)
        u = unit_factor[members, members]
        # The weights of this group at the optimum given all that is already quantized: w + A_g L̃_gg⁻¹.
        shift = torch.linalg.solve_triangular(u.mT, z[members] - w[members], upper=True, unitriangular=True)
        updated = w[members] + shift
        s = formats.compute_scales(updated.T.to(torch.float32).contiguous(), format, rule, g)       # [N]
        scales[start // group] = s
        round_column = _rounder(s, format, g)
        for j in range(start + group - 1, start - 1, -1):
            torch.sub(w[j], round_column(z[j].to(torch.float32)), out=error[j])
            if j > start:
                z[start:j].addr_(unit_factor[j, start:j], error[j])
        if start:
            z[:start].addmm_(unit_factor[members, :start].T, error[members])
    scale = torch.stack(scales, -1)                                         # [N, B/G]
    groups = z.T.to(torch.float32).unflatten(-1, (-1, group))               # [N, B/G, G]
    return formats.encode(groups, scale, format, g).flatten(-2), scale, error


def round_e2m1(v: Tensor) -> Tensor:
    """fp32 [..], overwritten -> the nearest e2m1 value; equals `formats.e2m1_round` but for the sign of zero.

    Adding and subtracting 1.5·2^22·p, p the power of two not above max(|v|, 1), rounds to multiples of p/2, half to
    even: a third of the ops, and none that the vector library threads, which costs more than it gives at one column.
    """
    v.clamp_(-formats.E2M1_MAX, formats.E2M1_MAX)
    power = v.abs().clamp_(min=1).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    magic = power.mul_(1.5 * 2**22)
    return v.add_(magic).sub_(magic)


def _rounder(scales: Tensor, format: str, g: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function fp32 [N] -> the decoded value of its code, float64 [N], for fixed scales [N] of the rows.

    The same as `formats.decode(formats.encode(...))`, without what does not change from column to column.
    """
    s = formats.decode_scales(scales, format)
    if format == "int4":
        wide = s.to(torch.float64)
        divisor = torch.where(s > 0, s, 1.0)
        return lambda v: (v / divisor).floor_().clamp_(-8, 7).add_(0.5).mul(wide)
    one = torch.ones((), dtype=torch.float32, device=s.device)
    g = one if g is None else g.reshape(())
    inverse = (1.0 / s) * g if format == "mxfp4" else g / s
    unit = s.to(torch.float64) / g.to(torch.float64)
    return lambda v: round_e2m1(v.mul_(inverse)).mul(unit)


def gptq(
    w: Tensor, factor: Tensor, block: int, transform_of: Callable[[int, Tensor | None], tuple[Tensor, Tensor] | None],
    format: str, rule: str, g: Tensor | None, updated_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks, from the last to the first.

    w [K, N]: Wᵀ; factor [K, K]: L; both float64. `transform_of(b, weights)` gives (T_b, T_b⁻¹), float64 [B, B], or None
    for the identity; with `updated_weights` it is handed the block's weights [B, N] at the optimum given all that is
    already quantized (Algorithm 2), else None. Returns codes uint8 [N, K], one a byte; scales [N, K/G]; Wᵀ − Q(W)ᵀ in
    the original basis, float64 [K, N].
    """
    channels = w.shape[0]
    error = torch.zeros_like(w)
    codes, scales = [], []
    for start in range(channels - block, -1, -block):
        here, later = slice(start, start + block), slice(start + block, channels)
        diagonal = factor[here, here]
        w_block = w[here]
        a = factor[later, here].T @ error[later]                            # A_bᵀ [B, N]
        updated = None
        if updated_weights:
            updated = w_block + torch.linalg.solve_triangular(diagonal.mT, a, upper=True)
        pair = transform_of(start // block, updated)
        if pair is None:
            c, s, error[here] = quantize_block(w_block, a, diagonal, format, rule, g)
        else:
            t, inverse = pair
            q, r = torch.linalg.qr((t @ diagonal).mT)                       # T L = Rᵀ Qᵀ
            c, s, e = quantize_block(inverse.mT @ w_block, q.mT @ a, r.mT, format, rule, g)
            error[here] = t.mT @ e
        codes.append(c)
        scales.append(s)
    return torch.cat(codes[::-1], -1), torch.cat(scales[::-1], -1), error
