"""Activations of 8 and 16 bits in the channel orders of the products that decode only the weight.

A look-up decodes the channels 0..3 of every 8 weights, then the channels 4..7; a bf16 decoder the even ones, then the
odd ones. The weight's order cannot change, so x takes the same one (`upcast.py`, `gemm._to_lanes`)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.formats import e4m3_factor
from ..common.overlap import overlaps, start_next, wait_inputs
from .upcast import source_row


@triton.jit(do_not_specialize=["T"])
def lane_order_kernel(
    x,
    out,
    index,
    rows,
    T,
    WIDTH: tl.constexpr,
    PITCH: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """x [T, WIDTH] -> out [rows, PITCH]; a program takes ROWS rows and COLUMNS columns. WIDTH is K, or K/4 where
    int32 words hold four e4m3 bytes each. PITCH is the same for K rounded up to a multiple of 128; the channels beyond
    K are zeros. Without an index T is `rows`; with one, int [rows], row r is made of x's row index[r]. Grid (tiles of
    rows, tiles of columns).

    ORDER of every 128 channels, which is that of the upcasts of `upcast.py`:
    halves   int32 words -> the even words, then the odd ones
    lanes    int32 words -> the same, each half in lane order
    int8     bf16 values, or e4m3 bytes, which become bf16 -> of every 64, a lane's 16 channels are 4 in each 16
    bf16     bf16 values, or e4m3 bytes, which become bf16 -> the even channels, then the odd ones, in lane order"""
    wait_inputs(PDL)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < rows)[:, None]
    r = tl.minimum(r, rows - 1)
    at = source_row(index, r, T).to(tl.int64)[:, None] * WIDTH + c[None, :]
    v = tl.load(x + at, mask=inside & (c < WIDTH)[None, :], other=0)
    if v.dtype == tl.uint8:
        byte = v.to(tl.int32)
        magnitude = e4m3_factor(byte & 0x7F)
        v = tl.where(byte >= 0x80, -magnitude, magnitude).to(tl.bfloat16)
    if ORDER == "halves":
        v = tl.permute(tl.reshape(v, (ROWS, COLUMNS // 32, 16, 2)), (0, 1, 3, 2))
    elif ORDER == "lanes":
        v = tl.permute(tl.reshape(v, (ROWS, COLUMNS // 32, 4, 4, 2)), (0, 1, 4, 3, 2))
    elif ORDER == "int8":
        v = tl.permute(tl.reshape(v, (ROWS, COLUMNS // 64, 4, 4, 2, 2)), (0, 1, 3, 4, 2, 5))
    else:
        v = tl.permute(tl.reshape(v, (ROWS, COLUMNS // 128, 2, 4, 4, 2, 2)), (0, 1, 6, 2, 4, 3, 5))
    at = r.to(tl.int64)[:, None] * PITCH + c[None, :]
    tl.store(out + at, tl.reshape(v, (ROWS, COLUMNS)), mask=inside & (c < PITCH)[None, :])
    start_next(PDL)


def _launch(x: Tensor, out: Tensor, order: str, index: Tensor | None) -> Tensor:
    rows, pitch = out.shape
    block, pdl = 1 if rows <= 64 else 4, x.is_cuda and overlaps(x.device.index)
    columns = min(512 if x.dtype == torch.int32 else 1024, triton.next_power_of_2(pitch))
    lane_order_kernel[(triton.cdiv(rows, block), triton.cdiv(pitch, columns))](
        x,
        out,
        index,
        rows,
        x.shape[0],
        x.shape[1],
        pitch,
        order,
        block,
        columns,
        pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out


def _rows(x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Room for `index`'s rows of x, or all of x's, filled up to a multiple of 128 channels."""
    return x.new_empty(((x if index is None else index).shape[0], -(-x.shape[1] // 128) * 128), dtype=dtype)


def fp8_order(codes: Tensor, lane_order: bool = True, index: Tensor | None = None) -> Tensor:
    """e4m3 bytes uint8 [M, K] -> e4m3 [M, K] in the order of `upcast_fp8`, filled up with zeros to a multiple of 128
    channels; `index` as there."""
    out = _rows(codes, index, torch.uint8)
    _launch(codes.view(torch.int32), out.view(torch.int32), "lanes" if lane_order else "halves", index)
    return out.view(torch.float8_e4m3fn)


def bf16_order(x: Tensor, index: Tensor | None = None) -> Tensor:
    """bf16 [M, K], or e4m3 bytes uint8 [M, K] -> bf16 [M, K], exact, in the lane order of `upcast_bf16`, filled up with
    zeros to a multiple of 128 channels; `index` as there."""
    return _launch(x, _rows(x, index, torch.bfloat16), "bf16", index)


def int8_order(x: Tensor) -> Tensor:
    """As `bf16_order`, in the order of `hopper_decode.decode_int8`."""
    return _launch(x, _rows(x, None, torch.bfloat16), "int8", None)
