"""`wush::fp4_grouped_linear` as launches in a graph: what `grouped.fp4_grouped_linear` launches, each for its band."""

import torch
import triton
from torch import Tensor

from ..common.memory import Workspace
from ..grouped.choose import GEMM, GEMV_EXPERTS, GEMV_ROWS, Gemm, Gemv, Scaled, choose, grouped_format
from ..grouped.find import most_tiles
from ..grouped.gemm import grouped_gemm_kernel
from ..grouped.gemv import grouped_gemv_kernel
from ..grouped.scaled import grouped_scaled_kernel
from ..grouped.upcast import MANY_ROWS
from .launches import Known, bands, dense, in_band, launch, tiles
from .operands import lane_order, upcast_bf16, upcast_fp8, upcast_many


def _limits(experts: int, same: bool) -> tuple[int, ...]:
    """Most rows of each band; the last band is open."""
    gemv = min(GEMV_ROWS, experts // GEMV_EXPERTS)
    limits = [gemv] if same and gemv else []
    averages = [most for table in GEMM.values() for most in table if most != float("inf")] + [64]
    return tuple(sorted({*limits, *(int(most * experts) for most in averages)}))


def _expanded(codes, scales, g, format: str, kind: str, activation: str, index, rows) -> tuple:
    """`grouped.fp4_grouped_linear.upcast_rows`: (x, its unit or None, the global scale that is left to divide by)."""
    fp8, made = kind == "mxfp4", None
    limits = (511, MANY_ROWS - 1) if fp8 and activation == "same" else (64,)
    for first, last, most in bands(rows, lambda most: most, limits):
        given = dict(here=in_band(rows, first, last), index=index, into=made)
        if activation != "same":
            made = lane_order(codes, "lanes" if fp8 else "bf16", many=most > 64, **given)
        elif fp8 and most >= MANY_ROWS:
            made = upcast_many(codes, scales, g, **given)
        elif fp8:
            made = upcast_fp8(codes, scales, g, lane_order=True, many=most >= 512, **given)
        else:
            made = upcast_bf16(codes, scales, None, format, lane_order=True, many=most > 64, **given)
    if activation == "fp8":
        return made, scales.reshape(-1) if index is None else scales.reshape(-1).index_select(0, index), g
    return (*made, None) if fp8 and activation == "same" else (made, None, g)


def fp4_grouped_linear(
    known: Known,
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_global_scale: Tensor | None,
    offs: Tensor,
    bias: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
    scale_layout: str = "rows",
    activation_format: str = "same",
    index: Tensor | None = None,
) -> Tensor:
    """`wush::fp4_grouped_linear` for a device of that compute capability, for scales in rows."""
    kind = grouped_format(format, activation_format, known.capability)
    experts, n, half = weight_codes.shape
    k, w, ws = 2 * half, dense(weight_codes), dense(weight_scales)
    codes, scales = dense(codes), dense(scales)
    rows = (codes if index is None else index).shape[0]

    def kernel(rows: int) -> Gemv | Gemm | Scaled:
        sizes = rows, experts, n, k, known.capability
        return choose(kind, activation_format, *sizes, portable=True)

    chosen = bands(rows, kernel, _limits(experts, activation_format == "same"))
    out = codes.new_empty((rows, n), dtype=out_dtype)
    common = dict(gw=weight_global_scale, offs=offs, bias=bias, N=n, K=k, E=experts)
    common |= dict(EXPERTS=triton.next_power_of_2(experts), SCALED_W=weight_global_scale is not None)
    common |= dict(BIAS=bias is not None)
    packed = common | dict(x_scales=scales, gx=global_scale, index=index, SCALED_X=global_scale is not None)
    if any(isinstance(tile, Gemm) for _, _, tile in chosen):
        x, unit, gx = _expanded(codes, scales, global_scale, format, kind, activation_format, index, rows)
        space = Workspace(codes.device)  # the package pass merges equal constants of a program
        decoded = common | dict(
            x=x,
            x_unit=unit,
            gx=gx,
            w=w,
            w_scales=torch.nn.functional.pad(ws, (0, -ws.shape[-1] % 4)).view(torch.int32),
            w_top=ws.amax(-1) if format == "mxfp4" else None,
            selectors={"mxfp4": space.selectors, "mxfp4_bf16": space.twice, "nvfp4": space.pairs}[kind],
            S=rows,
            FORMAT=kind,
            SCALED_X=gx is not None,
        )
    for first, last, tile in chosen:
        here = in_band(rows, first, last)
        if isinstance(tile, Gemv):
            out = launch(
                grouped_gemv_kernel,
                ("out",),
                (here * tiles(n, tile.block_n), rows),
                tile.warps,
                **packed,
                x=codes.view(torch.int32),
                w=w.view(torch.int32),
                w_scales=ws,
                out=out,
                T=codes.shape[0],
                FORMAT=format,
                BLOCK_N=tile.block_n,
                BLOCK_K=min(tile.block_k, max(triton.next_power_of_2(k), 128)),
            )["out"]
            continue
        grid = (here * most_tiles(rows, experts, tile.block_m) * tiles(n, tile.block_n),)
        blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, STAGES=tile.stages)
        if isinstance(tile, Scaled):
            float_scales = torch.uint8 if format == "mxfp4" else torch.float8_e4m3fn
            operands = dict(packed, x=codes, x_scales=scales.view(float_scales), w=w, w_scales=ws.view(float_scales))
            sizes = dict(S=rows, T=codes.shape[0], G=32 if format == "mxfp4" else 16)
            out = launch(grouped_scaled_kernel, ("out",), grid, tile.warps, **operands, **sizes, out=out, **blocks)[
                "out"
            ]
        else:
            out = launch(grouped_gemm_kernel, ("out",), grid, tile.warps, tile.stages, **decoded, out=out, **blocks)[
                "out"
            ]
    return out
