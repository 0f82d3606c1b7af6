"""`wush::fp4_grouped_linear` as launches in a graph (`packaged.py`): `grouped.gemm` with a tile for each band of rows.

The other kernels of `grouped` are left out: Gluon's has no form for a package, and Blackwell's takes the place of none.
"""

import torch
import triton
from torch import Tensor

from .common.memory import Workspace
from .grouped.choose import gemm_tile, grouped_format
from .grouped.find import most_tiles
from .grouped.gemm import grouped_gemm_kernel
from .launches import bands, dense, in_band, launch, tiles
from .linear.upcast import upcast_bf16_kernel, upcast_fp8_kernel

# Most rows of each band, as a multiple of the number of experts; the last band is open.
BANDS = (8, 24)


def _upcast(format: str, kind: str, x: Tensor, scales: Tensor, g: Tensor | None, index: Tensor | None, rows, k: int):
    """The rows of x as `grouped.gemm` reads them, and their unit or None."""
    width = -(-k // 128) * 128
    if kind == "mxfp4":
        groups = triton.next_power_of_2(k // 32)
        made = launch(
            upcast_fp8_kernel,
            ("out", "unit"),
            (rows,),
            4,
            codes=x.view(torch.int32),
            scales=scales,
            g=g,
            unit=x.new_empty(rows, dtype=torch.float32),
            out=x.new_empty((rows, width // 4), dtype=torch.int32),
            index=index,
            T=x.shape[0],
            K=k,
            ROW_GROUPS=groups,
            E4M3=False,
            SCALED=g is not None,
            GROUPS=max(4, min(groups, 128)),
            LANE_ORDER=True,
        )
        return made["out"].view(torch.float8_e5m2), made["unit"]
    made = launch(
        upcast_bf16_kernel,
        ("out",),
        (rows, tiles(k, 1024)),
        4,
        codes=x,
        scales=scales,
        g=None,
        out=x.new_empty((rows, width), dtype=torch.bfloat16),
        index=index,
        rows=rows,
        T=x.shape[0],
        K=k,
        FORMAT=format,
        SCALED=False,
        ROWS=1,
        BYTES=512,
        LANE_ORDER=True,
    )
    return made["out"], None


def fp4_grouped_linear(
    capability: tuple[int, int],
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
    kind = grouped_format(format, activation_format, capability)
    experts, n, half = weight_codes.shape
    k, w, ws = 2 * half, dense(weight_codes), dense(weight_scales)
    rows = (codes if index is None else index).shape[0]
    gx = None if kind == "mxfp4" else global_scale  # the fp8 rows' unit holds it
    x, unit = _upcast(format, kind, dense(codes), dense(scales), global_scale, index, rows, k)
    space = Workspace(codes.device)  # the package pass merges equal constants of a program
    top = ws.amax(-1) if format == "mxfp4" else None
    words = torch.nn.functional.pad(ws, (0, -ws.shape[-1] % 4)).view(torch.int32)
    out = codes.new_empty((rows, n), dtype=out_dtype)
    limits = tuple(most * experts for most in BANDS)
    for first, last, tile in bands(
        rows, lambda most: gemm_tile("mxfp4" if kind == "mxfp4" else "nvfp4", most / experts, k), limits
    ):
        grid = in_band(rows, first, last) * most_tiles(rows, experts, tile.block_m) * tiles(n, tile.block_n)
        out = launch(
            grouped_gemm_kernel,
            ("out",),
            (grid,),
            tile.warps,
            tile.stages,
            x=x,
            x_unit=unit,
            gx=gx,
            w=w,
            w_scales=words,
            w_top=top,
            gw=weight_global_scale,
            offs=offs,
            bias=bias,
            selectors={"mxfp4": space.selectors, "mxfp4_bf16": space.twice, "nvfp4": space.pairs}[kind],
            out=out,
            S=rows,
            N=n,
            K=k,
            E=experts,
            EXPERTS=triton.next_power_of_2(experts),
            FORMAT=kind,
            SCALED_X=gx is not None,
            SCALED_W=weight_global_scale is not None,
            BIAS=bias is not None,
            BLOCK_N=tile.block_n,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            STAGES=tile.stages,
        )["out"]
    return out
