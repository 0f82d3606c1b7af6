"""`wush::observe_cross`: what the groups in front have changed in a group's input, for `solver/correction.py`."""

import torch
from torch import Tensor

from ..errors import DataError
from ..phases import phase
from .schema import define

# Rows that are added at a time: their fp32 values are temporary.
ROWS = 4096


def _add(rows: Tensor, change: Tensor, cross: Tensor, dtype: torch.dtype) -> None:
    """cross fp32 [K, K] += rowsᵀ·change, fp32 [n, K] each, of a model in this dtype.

    A GPU adds up products of bf16 in fp32, 16 times as fast as of fp32, where the model has 16 bits: what a rounded
    model changes is known to no more digits.
    """
    if rows.is_cuda and dtype in (torch.bfloat16, torch.float16):
        rows, change = rows.to(torch.bfloat16), change.to(torch.bfloat16)
        torch.addmm(cross, rows.T, change, out_dtype=torch.float32, out=cross)
    else:
        cross.addmm_(rows.T, change)


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
    if reference.shape != x.shape:
        raise DataError(
            f"a group's input has the shape {list(x.shape)} in the quantized model and {list(reference.shape)} in the "
            "unquantized one: give correction=0"
        )
    rows, others = (t.reshape(-1, t.shape[-1]) for t in (x, reference))  # [n, K]
    weight = torch.ones_like(rows[:, 0], dtype=torch.float32) if weight is None else weight.reshape(-1)
    if mask is not None:
        kept = mask.reshape(-1) != 0
        rows, others, weight = rows[kept], others[kept], weight[kept]
    with phase("moments"):
        for own, other, w in zip(*(t.split(ROWS) for t in (rows, others, weight)), strict=True):
            own, other = own.to(torch.float32), other.to(torch.float32)
            _add(own * w.to(torch.float32)[:, None], other - own, cross, x.dtype)


def _observe_cross_fake(x, mask, reference, cross, weight=None):
    for other in (mask, reference, cross, weight):
        if other is not None:
            torch._check(other.device == x.device, lambda: f"x is on {x.device}, an operand on {other.device}")
    k = x.shape[-1]
    torch._check(reference.shape[-1] == k, lambda: f"the reference has {reference.shape[-1]} channels, x has {k}")
    torch._check(cross.shape == (k, k), lambda: f"cross is {list(cross.shape)}, x has {k} channels")


define("observe_cross", _observe_cross, _observe_cross_fake, mutates=("cross",))
