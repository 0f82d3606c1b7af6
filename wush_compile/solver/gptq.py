"""GPTQ in the transformed basis, as Babai's nearest plane algorithm (docs/spec.md §3).

It needs no inverse of H, and it rounds all rows at once.

With H = L Lᵀ (L lower) the loss of an error D [N, K] is ‖D L‖². Column j of D L depends only on channels ≥ j. Channels
are rounded from the last to the first. Given the channels already quantized, the value w_j + A_j / L_jj with
A_j = Σ_{i>j} d_i L_ij makes column j zero. That value is rounded, and its error d_j enters the A of earlier channels.

In the transformed basis W̃ = W T⁻¹ the error is D = D̃ T. T L is block lower triangular, and T_b L_bb = L̃_b Qᵀ with L̃_b
lower and Q orthogonal. With the Q of all blocks, T L Q is the lower factor of T H Tᵀ: GPTQ of W̃ with this factor is
GPTQ of W with H.

Which block lies where, the solver chooses (`order.py`); here channels lie as they are given.

A conditional transform is known only when its block is reached. Then the channels of a block are rounded in these
rotated coordinates, and errors pass between blocks in the original ones. All arithmetic is float64. Matrices are
transposed to [channels, rows].

Weights of one shape, each with a factor of its own, are rounded side by side (experts): their rows stand one behind the
other, W̃ᵀ [K, E·N], and U has one matrix for each, [E, K, K].

On a GPU one kernel rounds all channels of a quantization group (`kernels/triton/calibration/gptq.py`). Errors pass from
group to group inside a span. They reach earlier spans in one matrix product a span.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import formats
from .transforms import apply_blockwise, diagonal_blocks

# Channels in a span.
SPAN = 256
# Entries of L that `rotate_` handles at a time.
ROTATED_ELEMENTS = 2**25


def triangular(m: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [.., B, B] -> (L̃ lower, Q orthogonal) with m = L̃ Qᵀ."""
    if m.is_cuda and m.dim() == 3:
        # On a GPU the library's QR factors one matrix after the other. Cholesky QR, done twice, is as orthogonal.
        first, failed = torch.linalg.cholesky_ex(m @ m.mT)
        rows = torch.linalg.solve_triangular(first, m, upper=False)
        second, again = torch.linalg.cholesky_ex(rows @ rows.mT)
        if not (failed | again).any():
            return first @ second, torch.linalg.solve_triangular(second, rows, upper=False).mT
    q, r = torch.linalg.qr(m.mT)
    return r.mT, q


def rotate_(factor: Tensor, transform: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """L [K, K], overwritten -> (U with ones on its diagonal, d [K]); T L Q = U diag(d) is the lower factor of T H Tᵀ.

    transform: float64 [K/B, B, B], [1, B, B] or None. Nothing above the diagonal blocks of L and U is read.
    """
    blocks = diagonal_blocks(factor, block)  # [K/B, B, B], a view
    lower, q = (blocks.clone(), None) if transform is None else triangular(transform @ blocks)
    diagonal = lower.diagonal(dim1=-2, dim2=-1)  # [K/B, B]
    size = factor.shape[0]
    step = max(1, ROTATED_ELEMENTS // (size * block)) * block
    for start in range(0, size, step):
        stop = min(start + step, size)
        part = factor[start:stop, :stop]
        if transform is None:
            part /= diagonal.flatten()[:stop]
            continue
        left = transform if transform.shape[0] == 1 else transform[start // block : stop // block]
        columns = apply_blockwise(part, left).unflatten(1, (-1, block)).transpose(0, 1)  # [stop/B, rows, B]
        part.copy_((columns @ (q / diagonal[:, None, :])[: stop // block]).transpose(0, 1).flatten(1))
    blocks.copy_(lower / diagonal[:, None, :])
    return factor, diagonal.flatten()


def by_weight(x: Tensor, unit: Tensor) -> Tensor:
    """A view of [C, E·N] as [E, C, N]; [C, N] as it is for a U of one weight."""
    return x if unit.dim() == 2 else x.unflatten(1, (len(unit), -1)).transpose(0, 1)


def side_by_side(x: Tensor) -> Tensor:
    """[E, C, N] -> [C, E·N], the inverse of `by_weight`; [C, N] as it is."""
    return x if x.dim() == 2 else x.transpose(0, 1).flatten(1)


def add_product_(z: Tensor, a: Tensor, b: Tensor) -> None:
    """z [C, E·N] += a b, by weight: a [E, C, D] (or [C, D]), b [D, E·N]."""
    if a.dim() == 2:
        z.addmm_(a, b)
    else:
        by_weight(z, a).baddbmm_(a, by_weight(b, a))


def _updated(w: Tensor, z: Tensor, unit: Tensor) -> Tensor:
    """The optimal weights [G, E·N] of a group, given the channels already quantized: w + A_g L̃_gg⁻¹."""
    shift = torch.linalg.solve_triangular(unit.mT, by_weight(z - w, unit), upper=True, unitriangular=True)
    return w + side_by_side(shift)


def round_group(
    w: Tensor,
    z: Tensor,
    unit: Tensor,
    format: str,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
) -> None:
    """Rounds one quantization group of G channels, from the last to the first. Fills codes, scales and error.

    w float64 [G, N]: the weights. z float64 [G, N]: the value that each channel would be rounded from if no later
    channel of the group had an error; overwritten by the value that it is rounded from. unit float64 [G, G]: the
    group's block of U. codes uint8 [G, N], one a byte; scales [N], the format's dtype; error float64 [G, N]: w − Q(w).
    With the rule `given` the scales are an input.
    """
    if rule != "given":
        updated = _updated(w, z, unit)
        scales.copy_(formats.compute_scales(updated.T.to(torch.float32).contiguous(), format, rule, g))
    round_column = _rounder(scales, format, g)
    for j in range(w.shape[0] - 1, -1, -1):
        torch.sub(w[j], round_column(z[j].to(torch.float32)), out=error[j])
        if j:
            z[:j].addr_(unit[j, :j], error[j])
    codes.copy_(formats.encode(z.T.to(torch.float32), scales, format, g).T)


def _round_each(
    w: Tensor,
    z: Tensor,
    unit: Tensor,
    format: str,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
    each: int | None = None,
) -> None:
    """`round_group` for the weights of a U [E, G, G] one after the other. w [G, C·E·N], each: N."""
    if unit.dim() == 2:
        round_group(w, z, unit, format, rule, g, codes, scales, error)
        return
    split = (-1, len(unit), each)
    for e, own in enumerate(unit):
        parts = [t.unflatten(-1, split)[..., e, :] for t in (w, z, codes, scales, error)]
        own_w, own_z, *own_results = (t.flatten(-2).clone(memory_format=torch.contiguous_format) for t in parts)
        round_group(own_w, own_z, own, format, rule, None if g is None else g[e : e + 1], *own_results)
        for part, result in zip(parts[2:], own_results, strict=True):
            part.copy_(result.view(part.shape))


def round_e2m1(v: Tensor) -> Tensor:
    """fp32 [..], overwritten -> the nearest e2m1 value. Equals `formats.e2m1_round`, except for the sign of zero.

    Let p be the power of two not above max(|v|, 1). Adding and subtracting 1.5·2^22·p rounds to multiples of p/2, half
    to even. This takes a third of the ops. The vector library runs none of them in threads, which for a single column
    cost more than they save.
    """
    v.clamp_(-formats.E2M1_MAX, formats.E2M1_MAX)
    power = v.abs().clamp_(min=1).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    magic = power.mul_(1.5 * 2**22)
    return v.add_(magic).sub_(magic)


def _rounder(scales: Tensor, format: str, g: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function: fp32 [N] -> the decoded values of their codes, float64 [N], for rows with these scales [N].

    It equals `formats.decode(formats.encode(...))`, but computes only once what all columns share.
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


def group_rounder(device: torch.device) -> Callable[..., None]:
    """`_round_each`, or on a GPU the kernel that does the same."""
    if device.type == "cuda":
        try:
            from ..kernels.triton.calibration import gptq as triton_gptq
        except ImportError:  # without Triton: the same, one launch for each op
            return _round_each
        if triton_gptq.available(device):
            return triton_gptq.round_group
    return _round_each


def round_best(
    w: Tensor,
    z: Tensor,
    unit: Tensor,
    diagonal: Tensor,
    format: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
    round_one: Callable[..., None] = _round_each,
) -> None:
    """`round_group` with the scale, of `formats.scale_candidates`, for which the group's part of the loss is least.

    The group is rounded with each candidate. Its columns of D L are d_j (z_j − q_j), where z_j is the value that
    channel j is rounded to q_j from; their squares are the loss. diagonal [G] or [E, G]: d. The first candidate wins
    ties.
    """
    weights = 1 if unit.dim() == 2 else len(unit)
    each = w.shape[1] // weights
    by_row = g if g is None or weights == 1 else g.repeat_interleave(each)
    found = formats.scale_candidates(_updated(w, z, unit).T.to(torch.float32).contiguous(), format, by_row)  # [C, E·N]
    count, rows = found.shape
    wide = w.repeat(1, count)  # [G, C·N]
    shift, found = (z - w).repeat(1, count), found.flatten()
    tried = torch.empty(wide.shape, dtype=torch.uint8, device=w.device), found, torch.empty_like(wide)
    round_one(wide, wide + shift, unit, format, "given", g, *tried, each)
    if weights == 1:
        shift = shift.addmm_(unit.mT, tried[2]) * diagonal[:, None]
    else:
        tried_rows = tried[2].unflatten(1, (count, weights, each)).permute(1, 2, 0, 3)  # [C, E, G, N]
        product = (unit.mT @ tried_rows).permute(2, 0, 1, 3).flatten(1)  # [G, C·E·N]
        shift = shift.add_(product).mul_(diagonal.T.repeat_interleave(each, 1).repeat(1, count))
    loss = shift.square_().sum(0).view(count, rows)
    best = loss.argmin(0)  # [N]
    at = (best * rows + torch.arange(rows, device=w.device)).expand(w.shape)  # [G, N]
    codes.copy_(tried[0].gather(1, at))
    error.copy_(tried[2].gather(1, at))
    scales.copy_(found[at[0]])


def _round_channels(
    w: Tensor,
    z: Tensor,
    unit: Tensor,
    diagonal: Tensor,
    format: str,
    rule: str,
    g: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    error: Tensor,
) -> None:
    """`round_group` or `round_best` for several groups, from the last to the first; scales [channels/G, E·N]."""
    each = w.shape[1] if unit.dim() == 2 else w.shape[1] // len(unit)
    group, round_one = formats.FORMATS[format].group_size, group_rounder(w.device)
    for start in range(w.shape[0] - group, -1, -group):
        here = slice(start, start + group)
        results = codes[here], scales[start // group], error[here]
        if rule == "loss":
            own = unit[..., here, here], diagonal[..., here]
            round_best(w[here], z[here], *own, format, g, *results, round_one)
        else:
            round_one(w[here], z[here], unit[..., here, here], format, rule, g, *results, each)
        if start:
            add_product_(z[:start], unit[..., here, :start].mT, error[here])


def _results(w: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Empty codes [K, N], scales [K/G, N] and error [K, N]."""
    fmt = formats.FORMATS[format]
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty((w.shape[0] // fmt.group_size, w.shape[1]), dtype=fmt.scale_dtype, device=w.device)
    return codes, scales, torch.empty_like(w)


def gptq(
    w: Tensor, unit: Tensor, diagonal: Tensor, format: str, rule: str, g: Tensor | None, span: int = SPAN
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds all channels, from the last to the first.

    w float64 [K, N]: W̃ᵀ; unit [K, K] and diagonal [K]: U and d; g fp32 [1] or None. Of E weights side by side: w
    [K, E·N], unit [E, K, K], diagonal [E, K], g [E]. Returns codes uint8 [E·N, K], one code a byte; scales [E·N, K/G];
    the error W̃ᵀ − Q(W̃)ᵀ [K, E·N].
    """
    codes, scales, error = _results(w, format)
    group = formats.FORMATS[format].group_size
    for stop in range(w.shape[0], 0, -span):
        start = max(0, stop - span)
        here = slice(start, stop)
        z = w[here].clone()
        add_product_(z, unit[..., stop:, here].mT, error[stop:])  # includes the errors of all later spans
        _round_channels(
            w[here],
            z,
            unit[..., here, here],
            diagonal[..., here],
            format,
            rule,
            g,
            codes[here],
            scales[start // group : stop // group],
            error[here],
        )
    return codes.T.contiguous(), scales.T.contiguous(), error


def gptq_conditional(
    w: Tensor,
    factor: Tensor,
    block: int,
    transform_of: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    format: str,
    rule: str,
    g: Tensor | None,
    span: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds all blocks, from the last to the first, with transforms that depend on the rounded blocks (Algorithm 2).

    w float64 [K, N]: Wᵀ; factor [K, K]: L. `transform_of(b, weights)` gives (T_b, T_b⁻¹), float64 [B, B]; `weights`
    [B, N] are the optimal ones of block b, given the channels already quantized. Returns what `gptq` returns, but with
    the error in the original basis, Wᵀ − Q(W)ᵀ.
    """
    codes, scales, error = _results(w, format)
    group = formats.FORMATS[format].group_size
    span = max(block, span or (SPAN if w.is_cuda else 0))  # few large products pay off on a GPU
    for stop in range(w.shape[0], 0, -span):
        first = max(0, stop - span)
        a_span = factor[stop:, first:stop].T @ error[stop:]  # Aᵀ [S, N], from all later spans
        for start in range(stop - block, first - 1, -block):
            here = slice(start, start + block)
            diagonal_block, a = factor[here, here], a_span[start - first : start - first + block]
            updated = w[here] + torch.linalg.solve_triangular(diagonal_block.mT, a, upper=True)  # [B, N]
            t, inverse = transform_of(start // block, updated)
            lower, q = triangular(t @ diagonal_block)
            diagonal = lower.diagonal()
            w_tilde = inverse.mT @ w[here]
            z = w_tilde + (q.mT @ a) / diagonal[:, None]
            e = torch.empty_like(w_tilde)
            _round_channels(
                w_tilde,
                z,
                lower / diagonal,
                diagonal,
                format,
                rule,
                g,
                codes[here],
                scales[start // group : (start + block) // group],
                e,
            )
            torch.mm(t.mT, e, out=error[here])
            if start > first:
                a_span[: start - first].addmm_(factor[here, first:start].T, error[here])
    return codes.T.contiguous(), scales.T.contiguous(), error
