"""`wush::observe_experts`: `wush::observe` for each expert of a layer, from the rows that are routed to it."""

import torch
from torch import Tensor

from .core import LARGEST_SHARE, _sample_largest, _sample_uniform
from .schema import define


def expert_of_rows(offs: Tensor, rows: int) -> Tensor:
    """offs int32 [E], the ends of the experts' rows -> int64 [rows], the expert of each row; E for rows behind them."""
    return torch.searchsorted(offs, torch.arange(rows, device=offs.device, dtype=offs.dtype), right=True)


def _observe_experts(
    x: Tensor,
    offs: Tensor,
    mask: Tensor | None,
    token: Tensor | None,
    moment: Tensor,
    count: Tensor,
    sample: Tensor,
    expert: Tensor,
    seed: int = 0,
) -> None:
    """x [S, K] in the order of experts; token int64 [S]: the entry of the mask that counts for each row.

    Adds to moment fp32 [E, K, K] or [E, K/B, B, B], and to count int64 [E]. sample [R, K] holds rows of all experts;
    expert fp32 [R, 1] says whose the rows of its uniform part are.
    """
    experts, number = offs.shape[0], expert_of_rows(offs, x.shape[0])
    kept = number < experts
    if mask is not None and token is not None:
        kept &= mask.reshape(-1)[token] != 0
    rows, number = x[kept], number[kept]
    new, start = torch.bincount(number, minlength=experts), 0
    for e, n in enumerate(new.tolist()):
        if n:
            torch.ops.wush.observe(rows[start : start + n], None, moment[e], new[e].clone(), sample[:0], seed)
        start += n
    if rows.shape[0] and sample.shape[0]:
        largest, seen = sample.shape[0] // LARGEST_SHARE, count.sum()
        uniform = sample.shape[0] - largest
        _sample_uniform(rows, sample[:uniform], seen, seed)
        _sample_uniform(number[:, None], expert[:uniform], seen, seed)  # slots depend on the rows' places alone
        if largest:
            _sample_largest(rows, sample[uniform:])
    count.add_(new)


def _observe_experts_fake(x, offs, mask, token, moment, count, sample, expert, seed=0):
    for other in (offs, mask, token, moment, count, sample, expert):
        if other is not None:
            torch._check(other.device == x.device, lambda: f"x is on {x.device}, its offsets or state elsewhere")
    experts = offs.shape[0]
    torch._check(moment.shape[0] == experts, lambda: f"the moment has {moment.shape[0]} experts, offs {experts}")


define("observe_experts", _observe_experts, _observe_experts_fake, mutates=("moment", "count", "sample", "expert"))
