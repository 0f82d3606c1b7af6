"""Operands of the products as launches in a graph: `linear.upcast` and `linear.lane_order`.

`here` is 1, or 0 where a band's grid is empty (`launches.in_band`). many: the number of rows is large, as the eager
launches decide it. into: what the launch of another band returned; its memory is written, else new memory."""

import torch
import triton
from torch import Tensor

from ..grouped.upcast import ROWS, WARPS, upcast_rows_kernel
from ..linear.lane_order import lane_order_kernel
from ..linear.upcast import upcast_bf16_kernel, upcast_both_kernel, upcast_fp8_kernel
from .launches import launch, tiles


def _width(k: int, lane_order: bool) -> int:
    return -(-k // 128) * 128 if lane_order else k


def _words(like: Tensor, rows, width: int, into: tuple[Tensor, Tensor] | None) -> Tensor:
    """int32 [rows, width / 4] for bytes."""
    if into is not None:
        return into[0].view(torch.int32)
    return like.new_empty((rows, width // 4), dtype=torch.int32)


def upcast_fp8(
    codes: Tensor,
    scales: Tensor,
    g: Tensor | None,
    *,
    e4m3: bool = False,
    lane_order: bool = False,
    many: bool = True,
    here=1,
    index: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(e4m3 or e5m2 [rows, K], unit fp32 [rows]) of MXFP4 codes uint8 [rows, K/2] and scales uint8 [rows, K/32]."""
    rows, k = (codes if index is None else index).shape[0], 2 * codes.shape[1]
    power = triton.next_power_of_2(k // 32)
    groups = max(4, min(power, 128 if many else 32))
    made = launch(
        upcast_fp8_kernel,
        ("out", "unit"),
        (here * rows, 1 if many else tiles(k // 32, groups)),
        4,
        codes=codes.view(torch.int32),
        scales=scales,
        g=g,
        unit=codes.new_empty(rows, dtype=torch.float32) if into is None else into[1],
        out=_words(codes, rows, _width(k, lane_order), into),
        index=index,
        T=codes.shape[0],
        K=k,
        ROW_GROUPS=power,
        E4M3=e4m3,
        SCALED=g is not None,
        GROUPS=groups,
        LANE_ORDER=lane_order,
    )
    return made["out"].view(torch.float8_e4m3fn if e4m3 else torch.float8_e5m2), made["unit"]


def upcast_many(
    codes: Tensor, scales: Tensor, g: Tensor | None, index: Tensor | None, here, into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`upcast_fp8` to e5m2 in lane order, several rows a program: `grouped.upcast`."""
    rows, k = (codes if index is None else index).shape[0], 2 * codes.shape[1]
    power = triton.next_power_of_2(k // 32)
    made = launch(
        upcast_rows_kernel,
        ("out", "unit"),
        (here * tiles(rows, ROWS),),
        WARPS,
        codes=codes.view(torch.int32),
        scales=scales,
        g=g,
        unit=codes.new_empty(rows, dtype=torch.float32) if into is None else into[1],
        out=_words(codes, rows, _width(k, True), into),
        index=index,
        T=codes.shape[0],
        S=rows,
        K=k,
        ROW_GROUPS=power,
        SCALED=g is not None,
        GROUPS=max(4, min(power, 128)),
        ROWS=ROWS,
    )
    return made["out"].view(torch.float8_e5m2), made["unit"]


def upcast_both(
    x: Tensor, x_scales: Tensor, gx: Tensor | None, w: Tensor, w_scales: Tensor, gw: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x e5m2 [M, K], its unit fp32 [M], w e4m3 [N, K], its unit fp32 [N]) of MXFP4 operands."""
    m, n, k = x.shape[0], w.shape[0], 2 * x.shape[1]
    power = triton.next_power_of_2(k // 32)
    made = launch(
        upcast_both_kernel,
        ("x_unit", "x_out", "w_unit", "w_out"),
        (m + n,),
        4,
        x=x.view(torch.int32),
        x_scales=x_scales,
        gx=gx,
        x_unit=x.new_empty(m, dtype=torch.float32),
        x_out=x.new_empty((m, k // 4), dtype=torch.int32),
        w=w.view(torch.int32),
        w_scales=w_scales,
        gw=gw,
        w_unit=x.new_empty(n, dtype=torch.float32),
        w_out=x.new_empty((n, k // 4), dtype=torch.int32),
        M=m,
        K=k,
        ROW_GROUPS=power,
        SCALED_X=gx is not None,
        SCALED_W=gw is not None,
        GROUPS=min(power, 128),
    )
    x_out, w_out = made["x_out"].view(torch.float8_e5m2), made["w_out"].view(torch.float8_e4m3fn)
    return x_out, made["x_unit"], w_out, made["w_unit"]


def upcast_bf16(
    codes: Tensor,
    scales: Tensor,
    g: Tensor | None,
    format: str,
    *,
    lane_order: bool = False,
    many: bool = True,
    here=1,
    index: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """bf16 [rows, K] of codes uint8 [rows, K/2] and scales uint8 [rows, K/G]."""
    rows, k, block = (codes if index is None else index).shape[0], 2 * codes.shape[1], 8 if many else 1
    return launch(
        upcast_bf16_kernel,
        ("out",),
        (here * tiles(rows, block), tiles(k, 1024)),
        4,
        codes=codes,
        scales=scales,
        g=g,
        out=codes.new_empty((rows, _width(k, lane_order)), dtype=torch.bfloat16) if into is None else into,
        index=index,
        rows=rows,
        T=codes.shape[0],
        K=k,
        FORMAT=format,
        SCALED=g is not None,
        ROWS=block,
        BYTES=512,
        LANE_ORDER=lane_order,
    )["out"]


def lane_order(
    x: Tensor, order: str, *, many: bool = True, here=1, index: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """x [M, K] of 8 or 16 bits in an order of `lane_order_kernel`: e4m3 for lanes and halves, bf16 for bf16."""
    words, block = order in ("lanes", "halves"), 4 if many else 1
    rows, unit = (x if index is None else index).shape[0], 4 if words else 1
    pitch = _width(x.shape[1], True) // unit
    columns = min(512 if words else 1024, triton.next_power_of_2(pitch))
    if into is None:
        into = x.new_empty((rows, pitch), dtype=torch.int32 if words else torch.bfloat16)
    out = launch(
        lane_order_kernel,
        ("out",),
        (here * tiles(rows, block), tiles(pitch, columns)),
        4,
        x=x.view(torch.int32) if words else x,
        out=into.view(torch.int32) if words else into,
        index=index,
        rows=rows,
        T=x.shape[0],
        WIDTH=x.shape[1] // unit,
        PITCH=pitch,
        ORDER=order,
        ROWS=block,
        COLUMNS=columns,
    )["out"]
    return out.view(torch.float8_e4m3fn) if words else out
