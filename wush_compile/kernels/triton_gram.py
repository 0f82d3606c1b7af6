"""Second moments on a GPU: moment += XᵀX of 16-bit rows, accumulated in fp32 without an fp32 copy of them."""

import functools

import torch
from torch import Tensor

from .. import ops


def add_moment(rows: Tensor, moment: Tensor) -> None:
    """moment += rowsᵀ·rows: rows bf16 or fp16 [n, K], moment fp32 [K, K], or [K/B, B, B] for its diagonal blocks."""
    if moment.dim() == 2:
        torch.addmm(moment, rows.T, rows, out_dtype=torch.float32, out=moment)
    else:
        blocks = rows.unflatten(-1, (moment.shape[0], -1)).transpose(0, 1)                   # [K/B, n, B]
        torch.baddbmm(moment, blocks.transpose(1, 2), blocks, out_dtype=torch.float32, out=moment)


observe = functools.partial(ops._observe, add_moment=add_moment)
