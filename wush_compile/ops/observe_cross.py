"""`wush::observe_cross`: what the groups in front have changed in a group's input, for `solver/correction.py`."""

import torch
from torch import Tensor

from ..phases import phase
from .schema import define


def _observe_cross(
    x: Tensor,
    mask: Tensor | None,
    reference: Tensor,
    cross: Tensor,
    weight: Tensor | None = None,
) -> None:
    """cross fp32 [K, K] += Σ w x (reference − x)ᵀ over rows.

    x, reference [.., K]: the group's input in the quantized and in the unquantized model. mask: 0 where a row does not
    count. weight: w of each row.
    """
    rows, others = (t.reshape(-1, t.shape[-1]).to(torch.float32) for t in (x, reference))  # [n, K]
    weight = None if weight is None else weight.reshape(-1).to(torch.float32)
    if mask is not None:
        kept = mask.reshape(-1) != 0
        rows, others, weight = rows[kept], others[kept], None if weight is None else weight[kept]
    with phase("moments"):
        scaled = rows if weight is None else rows * weight[:, None]
        cross.addmm_(scaled.T, others - rows)


def _observe_cross_fake(x, mask, reference, cross, weight=None):
    for other in (mask, reference, cross, weight):
        if other is not None:
            torch._check(other.device == x.device, lambda: f"x is on {x.device}, an operand on {other.device}")
    k = x.shape[-1]
    torch._check(reference.shape[-1] == k, lambda: f"the reference has {reference.shape[-1]} channels, x has {k}")
    torch._check(cross.shape == (k, k), lambda: f"cross is {list(cross.shape)}, x has {k} channels")


define("observe_cross", _observe_cross, _observe_cross_fake, mutates=("cross",))
