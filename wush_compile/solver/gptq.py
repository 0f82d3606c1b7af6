"""GPTQ in the transformed basis, as Babai's nearest plane (SPEC §3): no inverse of H, rows side by side.

With H = L Lᵀ (L lower) the loss of an error D [N, K] is ‖D L‖², and column j of D L depends on channels ≥ j only. Going
from the last channel to the first, the value that would make column j zero, given what is already quantized, is
w_j + A_j / L_jj with A_j = Σ_{i>j} d_i L_ij; it is rounded, and its own error enters the A of the channels before it.

In the transformed basis W̃ = W T⁻¹, D = D̃ T. T L is block lower triangular, and T_b L_bb = L̃_b Qᵀ with L̃_b lower and
Q orthogonal; so ‖D L‖ of block b is ‖D̃_b L̃_b + A_b Q‖: within a block everything happens in these rotated
coordinates, between blocks the errors are kept in the original ones. All is float64, transposed to [channels, rows].

On a GPU the channels of a quantization group are one kernel (`kernels.triton_gptq`), and what the blocks beyond a span
of channels add to A is one matrix product for the span.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import formats

# Channels whose A takes the errors of all later spans in one matrix product. One block at a time would read those errors
# K/B times; a wider span is itself updated K/B times. On a CPU both are in the noise, and a span is one block.
CUDA_SPAN = 256


class Rotation(NamedTuple):
    """Transform blocks in the coordinates where their factor is triangular again; all float64."""

    transform: Tensor | None    # T_b [.., B, B]; None for the identity
    inverse: Tensor | None      # T_b⁻¹
    q: Tensor | None            # Q of T_b L_bb = L̃_b Qᵀ
    unit: Tensor                # U [.., B, B]: L̃_b = U diag(diagonal)
    diagonal: Tensor            # [.., B]

    def block(self, b: int) -> "Rotation":
        """The b-th one alone, of many."""
        return Rotation(*(None if t is None else t[b] for t in self))


def rotate(transform: Tensor | None, inverse: Tensor | None, diagonal_blocks: Tensor) -> Rotation:
    """transform, inverse: [.., B, B], broadcast, or None; diagonal_blocks [.., B, B]: L_bb."""
    q, lower = None, diagonal_blocks
    if transform is not None:
        q, r = torch.linalg.qr((transform @ diagonal_blocks).mT)            # T L = Rᵀ Qᵀ
        lower = r.mT
        transform, inverse = (t.expand_as(lower) for t in (transform, inverse))
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    return Rotation(transform, inverse, q, lower / diagonal[..., None, :], diagonal)


def round_group(
    w: Tensor, z: Tensor, unit: Tensor, format: str, rule: str, g: Tensor | None, codes: Tensor, scales: Tensor,
    error: Tensor,
) -> None:
    """One quantization group of G channels, from the last to the first; fills codes, scales and error.

    w [G, N]: the weights; z [G, N]: what each channel would be rounded from if no later one of the group had an error,
    overwritten by what it was rounded from; unit [G, G]: the group's block of U; all float64. codes uint8 [G, N], one a
    byte; scales [N] in the format's dtype; error float64 [G, N]: w − Q(w).
    """
    # The weights of this group at the optimum given all that is already quantized: w + A_g L̃_gg⁻¹.
    shift = torch.linalg.solve_triangular(unit.mT, z - w, upper=True, unitriangular=True)
    updated = w + shift
    scales.copy_(formats.compute_scales(updated.T.to(torch.float32).contiguous(), format, rule, g))
    round_column = _rounder(scales, format, g)
    for j in range(w.shape[0] - 1, -1, -1):
        torch.sub(w[j], round_column(z[j].to(torch.float32)), out=error[j])
        if j:
            z[:j].addr_(unit[j, :j], error[j])
    codes.copy_(formats.encode(z.T.to(torch.float32), scales, format, g).T)


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


def _group_rounder(device: torch.device) -> Callable[..., None]:
    """`round_group`, or on a GPU the kernel that does the same."""
    if device.type == "cuda":
        try:
            from ..kernels import triton_gptq
        except ImportError:                                                 # no triton: the same, launch by launch
            return round_group
        if triton_gptq.available(device):
            return triton_gptq.round_group
    return round_group


def gptq(
    w: Tensor, factor: Tensor, block: int, rotation_of: Callable[[int, Tensor | None], Rotation],
    format: str, rule: str, g: Tensor | None, updated_weights: bool = False, span: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks, from the last to the first.

    w [K, N]: Wᵀ; factor [K, K]: L, of which blocks above the diagonal ones are not read; both float64.
    `rotation_of(b, weights)` gives block b's `Rotation`; with `updated_weights` it is handed the block's weights [B, N]
    at the optimum given all that is already quantized (Algorithm 2), else None. Returns codes uint8 [N, K], one a byte;
    scales [N, K/G]; Wᵀ − Q(W)ᵀ in the original basis, float64 [K, N]. `span`: see CUDA_SPAN.
    """
    channels, rows = w.shape
    fmt = formats.FORMATS[format]
    group = fmt.group_size
    span = max(block, span or (CUDA_SPAN if w.is_cuda else 0))
    round_one = _group_rounder(w.device)
    error = torch.empty_like(w)
    codes = torch.empty((channels, rows), dtype=torch.uint8, device=w.device)
    scales = torch.empty((channels // group, rows), dtype=fmt.scale_dtype, device=w.device)
    for stop in range(channels, 0, -span):
        first = max(0, stop - span)
        a_span = factor[stop:, first:stop].T @ error[stop:]                 # Aᵀ [S, N], from all later spans
        for start in range(stop - block, first - 1, -block):
            here = slice(start, start + block)
            w_block, a = w[here], a_span[start - first : start - first + block]                    # [B, N]
            updated = None
            if updated_weights:
                updated = w_block + torch.linalg.solve_triangular(factor[here, here].mT, a, upper=True)
            r = rotation_of(start // block, updated)
            if r.transform is not None:
                w_block, a = r.inverse.mT @ w_block, r.q.mT @ a
            z = w_block + a / r.diagonal[:, None]                           # what gets rounded, as it stands
            block_error = error[here] if r.transform is None else torch.empty_like(w_block)
            for low in range(block - group, -1, -group):
                members = slice(low, low + group)
                round_one(
                    w_block[members], z[members], r.unit[members, members], format, rule, g,
                    codes[start + low : start + low + group], scales[(start + low) // group], block_error[members],
                )
                if low:
                    z[:low].addmm_(r.unit[members, :low].T, block_error[members])
            if r.transform is not None:
                torch.mm(r.transform.mT, block_error, out=error[here])
            if start > first:
                a_span[: start - first].addmm_(factor[here, first:start].T, error[here])
    return codes.T.contiguous(), scales.T.contiguous(), error
