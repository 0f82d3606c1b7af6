"""Second moments on a GPU: moment += XᵀX of 16-bit rows, accumulated in fp32 without an fp32 copy of them.

The whole moment is a product of the library. The diagonal blocks alone are a kernel that reads X once. A program takes
64 columns and a share of the rows; the sums of the shares are added in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....ops import core as ops

TILE_COLUMNS, TILE_ROWS = 64, 64
LOAD_STAGES = 4  # tiles in flight
GRID_PROGRAMS = 1056  # enough to fill any GPU several times
WEIGHTED_ROWS = 4096  # rows weighted at a time: their fp32 values are temporary


@triton.jit(do_not_specialize=["M", "share"])
def block_moment_kernel(
    x,
    out,
    M,
    share,
    stride,
    K: tl.constexpr,
    B: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [M, K] -> out fp32 [shares, K/B, B, B]; grid (columns/W, shares), `share` rows each, a multiple of R."""
    first = tl.program_id(0) * W
    start = tl.program_id(1) * share
    x += start.to(tl.int64) * stride + first
    columns = tl.arange(0, W)
    inside = (first + columns < K)[None, :]
    total = tl.zeros((W, W), tl.float32)
    for row in tl.range(0, tl.minimum(share, M - start), R, num_stages=STAGES):
        rows = row + tl.arange(0, R)[:, None]
        there = rows < M - start
        if K % W != 0:
            there = there & inside
        tile = tl.load(x + rows.to(tl.int64) * stride + columns[None, :], mask=there, other=0.0)  # [R, W]
        total = tl.dot(tl.trans(tile), tile, total)
    i, j = columns[:, None], columns[None, :]
    out += tl.program_id(1).to(tl.int64) * (K * B) + first * B
    tl.store(out + i * B + j % B, total, mask=(i // B == j // B) & inside)


def _add_blocks(rows: Tensor, moment: Tensor) -> None:
    """moment [K/B, B, B] += the diagonal blocks of rowsᵀ·rows."""
    count, width = rows.shape
    shares = max(1, min(triton.cdiv(count, 4 * TILE_ROWS), GRID_PROGRAMS // triton.cdiv(width, TILE_COLUMNS)))
    share = triton.cdiv(triton.cdiv(count, shares), TILE_ROWS) * TILE_ROWS
    shares = triton.cdiv(count, share)
    parts = torch.empty((shares, *moment.shape), dtype=torch.float32, device=rows.device)
    block_moment_kernel[(triton.cdiv(width, TILE_COLUMNS), shares)](
        rows,
        parts,
        count,
        share,
        rows.stride(0),
        width,
        moment.shape[-1],
        TILE_COLUMNS,
        TILE_ROWS,
        LOAD_STAGES,
        num_warps=4,
    )
    moment.add_(parts.sum(0))


def add_moment(rows: Tensor, moment: Tensor, weight: Tensor | None = None) -> None:
    """moment += rowsᵀ·diag(weight)·rows: rows bf16 or fp16 [n, K], weight [n], moment fp32 [K, K] or [K/B, B, B].

    Weighted rows are rounded to bf16 once more: fp16 might overflow.
    """
    if weight is not None:
        for part, own in zip(rows.split(WEIGHTED_ROWS), weight.split(WEIGHTED_ROWS)):
            add_moment(ops.scaled_rows(part, own).to(torch.bfloat16), moment)
        return
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if moment.dim() == 2:
        torch.addmm(moment, rows.T, rows, out_dtype=torch.float32, out=moment)
    elif TILE_COLUMNS % moment.shape[-1] == 0:
        _add_blocks(rows, moment)
    else:
        blocks = rows.unflatten(-1, (moment.shape[0], -1)).transpose(0, 1)  # [K/B, n, B]
        torch.baddbmm(moment, blocks.transpose(1, 2), blocks, out_dtype=torch.float32, out=moment)


observe = functools.partial(ops.observe_with, add_moment)
