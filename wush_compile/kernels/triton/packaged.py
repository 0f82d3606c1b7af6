"""The ops as graphs of Triton launches, for programs without Python: AOTInductor compiles the kernels into the package.

A kernel suits a band of row counts M, while a program serves every M. So the graph holds one launch for each band, with
a grid that is empty outside the band; an empty grid is not launched. Bands that the program's shapes exclude have no
launch. A library call cannot be skipped in this way, so the fused product takes the bands that cuBLAS takes otherwise.
"""

import functools

import torch
import triton
from torch import Tensor

from ...formats import FORMATS
from ...ops.schema import bind, check
from .common.memory import Workspace
from .launches import band_rows, bands, dense, in_band, launch, tiles
from .linear.choose import FUSED_MANY_ROWS, GROUP_M, Fused, Gemv, Scaled, choose
from .linear.gemm import fused_gemm_kernel
from .linear.gemv import gemv_kernel
from .linear.scaled import scaled_gemm_kernel
from .linear.upcast import upcast_bf16_kernel, upcast_fp8_kernel
from .packaged_grouped import fp4_grouped_linear
from .provider import IMPLEMENTATIONS
from .quantize.spec import make_spec
from .quantize.tiles import choose_tile, instructions
from .quantize.transform_quantize import dense_rows, flat_transform_quantize_kernel

# The product for many rows in NVFP4: both operands are decoded first.
FUSED_MANY_ROWS_NVFP4 = Fused(128, 128, 128, 1, 8, 3, True)

# -- transform_quantize ----------------------------------------------------------------------------------------------


def transform_quantize(
    capability: tuple[int, int],
    x: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for a device of that compute capability, with scales in rows."""
    width, lead = x.shape[-1], x.shape[:-1]
    rows = dense_rows(x)
    m = rows.shape[0]
    codes = x.new_empty((m, width // 2), dtype=torch.uint8)
    scales = x.new_empty((m, width // FORMATS[format].group_size), dtype=torch.uint8)
    block = 0 if transform is None else transform.shape[-1]
    for first, last, tile in bands(m, lambda rows: choose_tile(rows, width, block)):
        grid = (tiles(width, tile.columns) * in_band(m, first, last) * tiles(m, tile.rows * tile.tiles),)
        spec = make_spec(rows, transform, global_scale, format, scale_rule, tile, instructions(capability))
        written = launch(
            flat_transform_quantize_kernel,
            ("codes", "scales"),
            grid,
            tile.warps,
            x=rows,
            t=None if transform is None else transform.contiguous(),
            global_scale=global_scale,
            codes=codes,
            scales=scales,
            M=m,
            pitch=rows.stride(0),
            **spec._asdict(),
        )
        codes, scales = written["codes"], written["scales"]
    return codes.view(*lead, codes.shape[-1]), scales.view(*lead, scales.shape[-1])


# -- fp4_linear ------------------------------------------------------------------------------------------------------


def _kernel(format: str, rows: int, n: int, k: int, capability: tuple[int, int]) -> Gemv | Fused | Scaled | None:
    """The kernel that `choose` names; the fused product in place of the library; None if no kernel fits."""
    if format == "int4":
        return None
    kernel = choose(format, rows, n, k, capability, portable=True)
    if not isinstance(kernel, str):
        return kernel
    if k % 128 or (capability < (9, 0) and format == "mxfp4"):
        return None
    return FUSED_MANY_ROWS if format == "mxfp4" else FUSED_MANY_ROWS_NVFP4


def fp4_linear(
    capability: tuple[int, int],
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_global_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
    scale_layout: str = "rows",
    activation_format: str = "same",
) -> Tensor:
    """`wush::fp4_linear` for a device of that compute capability, for scales in rows."""
    lead, half = codes.shape[:-1], codes.shape[-1]
    n, k, mx = weight_codes.shape[0], 2 * half, format == "mxfp4"
    x, xs = codes.reshape(-1, half), scales.reshape(-1, scales.shape[-1])
    w, ws = dense(weight_codes), dense(weight_scales)
    m = x.shape[0]
    out = x.new_empty((m, n), dtype=out_dtype)
    late = residual if residual is not None and residual.dtype != out_dtype else None
    added = None if residual is None or late is not None else residual.reshape(-1, n).contiguous()
    space = Workspace(x.device)  # the package pass merges equal constants of a program
    top = ws.amax(-1) if mx else None  # uint8 [N]: see `row_facts` in common/memory.py
    x_words = x.view(torch.int32)
    ws_words = ws.view(torch.int32) if k % 128 == 0 else None
    common = dict(
        w=w,
        gw=weight_global_scale,
        bias=bias,
        residual=added,
        N=n,
        K=k,
        SCALED_W=weight_global_scale is not None,
        BIAS=bias is not None,
        RESIDUAL=added is not None,
    )
    for first, last, kernel in bands(m, lambda rows: _kernel(format, rows, n, k, capability)):
        here = in_band(m, first, last)
        if isinstance(kernel, Gemv):
            block_k = min(kernel.block_k, max(triton.next_power_of_2(k), 128))
            out = launch(
                gemv_kernel,
                ("out",),
                (here * tiles(n, kernel.block_n), m),
                kernel.warps,
                **common | {"w": w.view(torch.int32)},
                x=x_words,
                x_scales=xs,
                gx=global_scale,
                w_scales=ws,
                out=out,
                M=1,
                FORMAT=format,
                SCALED_X=global_scale is not None,
                BLOCK_N=kernel.block_n,
                BLOCK_K=block_k,
            )["out"]
        elif isinstance(kernel, Scaled):
            kind = torch.uint8 if mx else torch.float8_e4m3fn
            out = launch(
                scaled_gemm_kernel,
                ("out",),
                (here * tiles(m, kernel.block_m) * tiles(n, kernel.block_n),),
                kernel.warps,
                **common,
                x=x,
                x_scales=xs.view(kind),
                gx=global_scale,
                w_scales=ws.view(kind),
                out=out,
                M=m,
                G=32 if mx else 16,
                SCALED_X=global_scale is not None,
                BLOCK_M=kernel.block_m,
                BLOCK_N=kernel.block_n,
                BLOCK_K=kernel.block_k,
                STAGES=kernel.stages,
            )["out"]
        else:
            most = m if last is None else last
            out = _fused(kernel, here, most, x, x_words, xs, global_scale, ws_words, top, space, out, common)
    y = out.view(*lead, n)
    return y if late is None else y + late


def _fused(
    tile: Fused, here, most, x, x_words, xs, gx, ws_words, top, space: Workspace, out: Tensor, common: dict
) -> Tensor:
    """`out` after the fused product of at most `most` rows."""
    m, n, k, mx = x.shape[0], common["N"], common["K"], top is not None
    unit = partials = arrivals = None
    if not tile.packed and mx:
        groups = triton.next_power_of_2(k // 32)
        expanded = launch(
            upcast_fp8_kernel,
            ("out", "unit"),
            (here * m,),
            4,
            codes=x_words,
            scales=xs,
            g=gx,
            unit=x.new_empty(m, dtype=torch.float32),
            out=x.new_empty((m, k // 4), dtype=torch.int32),
            index=None,
            T=m,
            K=k,
            ROW_GROUPS=groups,
            E4M3=False,
            SCALED=gx is not None,
            GROUPS=min(groups, 128),
            LANE_ORDER=True,
        )
        x, unit, gx = expanded["out"].view(torch.float8_e5m2), expanded["unit"], None
    elif not tile.packed:
        block = 1 if most is not m and most <= 64 else 8
        x = launch(
            upcast_bf16_kernel,
            ("out",),
            (here * tiles(m, block), tiles(k, 1024)),
            4,
            codes=x,
            scales=xs,
            g=None,
            out=x.new_empty((m, k), dtype=torch.bfloat16),
            index=None,
            rows=m,
            T=m,
            K=k,
            FORMAT="nvfp4",
            SCALED=False,
            ROWS=block,
            BYTES=512,
            LANE_ORDER=True,
        )["out"]
    if tile.split_k > 1:  # sized for the band: M may be far larger
        partials = x.new_empty((tile.split_k, most, n), dtype=torch.float32)
        arrivals = torch.zeros(tiles(n, tile.block_n) * tiles(most, tile.block_m), dtype=torch.int32, device=x.device)
    # `arrivals` is zero again when the kernel ends. So it is not an output, and all products of a program can share it.
    return launch(
        fused_gemm_kernel,
        ("out", "partials"),
        (here * tiles(n, tile.block_n) * tiles(m, tile.block_m), tile.split_k),
        tile.warps,
        tile.stages,
        **common,
        x=x,
        x_scales=xs.view(torch.int32) if tile.packed else None,
        x_unit=unit,
        gx=gx,
        w_scales=ws_words,
        w_top=top,
        selectors=space.selectors if mx else space.pairs,
        out=out,
        partials=partials,
        arrivals=arrivals,
        M=m,
        FORMAT="mxfp4" if mx else "nvfp4",
        PACKED=tile.packed,
        SCALED_X=gx is not None,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        STAGES=tile.stages,
        GROUP_M=GROUP_M,
    )["out"]


# -- which ops -------------------------------------------------------------------------------------------------------

PACKAGED = {
    "transform_quantize": transform_quantize,
    "fp4_linear": fp4_linear,
    "fp4_grouped_linear": fp4_grouped_linear,
}
for op, function in PACKAGED.items():
    check(op, "the packaged function", functools.partial(function, (0, 0)))  # the capability comes first


def refuses(op: str, capability: tuple[int, int], *args) -> str | None:
    """Why a call cannot be packaged as Triton launches; None if it can."""
    call = bind(op, args)
    if call["scale_layout"] != "rows":
        return "packaged kernels take scales in rows"
    if call.get("activation_format", "same") != "same":
        return f"{call['activation_format']} activations have no packaged kernel"
    reason = IMPLEMENTATIONS[op].refuses(*args)
    if reason is None and op == "fp4_linear":
        format, (n, half) = call["format"], call["weight_codes"].shape
        k = 2 * half
        if any(_kernel(format, rows, n, k, capability) is None for rows in band_rows()):
            return f"width {k} in {format} has no kernel without a library at compute capability {capability}"
    return reason
