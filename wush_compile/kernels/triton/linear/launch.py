"""One launch for each Triton product: grid, tile and arguments. All write `out` [M, N].

All take the canonical layout: codes [.., K/2] and scales [.., K/G], row-major. A weight needs nothing prepared but, for
MXFP4, the largest scale byte of every row (N bytes). It is found once and kept with the tensor's memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...facts import mark_used_and_were_settled
from ..common.memory import Workspace, multiprocessors, row_facts, workspace
from ..common.overlap import overlaps
from .choose import GROUP_M, Fused, Gemv, Hopper, Int4, Int8, Int8Gemv, Scaled, split_tail
from .gemm import fused_gemm_kernel
from .gemv import gemv_kernel
from .int4 import int4_gemm_kernel
from .int8 import int8_gemm_kernel, int8_gemv_kernel
from .lane_order import bf16_order, fp8_order, int8_order
from .operands import Operands
from .scaled import scaled_gemm_kernel
from .upcast import upcast_bf16, upcast_fp8


def run_gemv(o: Operands, tile: Gemv, out: Tensor) -> None:
    m, n, k = o.sizes
    block_k = min(tile.block_k, max(triton.next_power_of_2(k), 128))
    pdl = overlaps(out.device.index) and mark_used_and_were_settled(o.weight_codes, o.weight_scales)
    gemv_kernel[(triton.cdiv(n, tile.block_n),)](
        o.codes.view(torch.int32),
        o.scales,
        o.global_scale,
        o.weight_codes.view(torch.int32),
        o.weight_scales,
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        n,
        k,
        m,
        o.format,
        *o.given,
        tile.block_n,
        block_k,
        pdl,
        num_warps=tile.warps,
        # With factors of rows ptxas takes 133 registers for two rows of x: one program a multiprocessor, not two.
        maxnreg=128 if tile.warps == 8 else None,
        launch_pdl=pdl,
    )


def upcast_x(o: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x as the products that decode only the weight read it: (fp8 or bf16 [M, K] in lane order, its unit [M] or None,
    the global scale that is left to divide by)."""
    unit = o.scales.view(-1) if o.activation == "fp8" else None
    if o.format == "int8":
        return int8_order(o.codes), unit, None
    if o.lanes:
        return o.codes.view(torch.float8_e4m3fn) if o.activation == "fp8" else o.codes, unit, o.global_scale
    if o.activation != "same":
        return fp8_order(o.codes) if o.decoded == "mxfp4" else bf16_order(o.codes), unit, o.global_scale
    if o.kernel_format == "mxfp4":
        return *upcast_fp8(o.codes, o.scales, o.global_scale, e4m3=False, lane_order=True), None
    return upcast_bf16(o.codes, o.scales, None, o.format, lane_order=True), None, o.global_scale


def run_fused(o: Operands, tile: Fused, out: Tensor) -> None:
    (m, n, k), mx = o.sizes, o.kernel_format == "mxfp4"
    space = workspace(out.device)
    x, x_unit, gx = (o.codes, None, o.global_scale) if tile.packed else upcast_x(o)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    if tiles > Workspace.RING:
        tile = tile._replace(split_k=1)
    # Programs that start early, while the quantizer's still run, crowd on the free multiprocessors. It is worth it only
    # behind an upcast, which lets the next kernel start when it ends.
    split, pdl = tile.split_k > 1, not tile.packed and overlaps(out.device.index)
    partials = torch.empty((tile.split_k, m, n), dtype=torch.float32, device=out.device) if split else None
    fused_gemm_kernel[(tiles, tile.split_k)](
        x,
        o.scales.view(torch.int32) if tile.packed else None,
        x_unit,
        gx,
        o.weight_codes,
        o.weight_scales.view(torch.int32),
        row_facts(o.weight_scales).top if o.format == "mxfp4" else None,
        o.weight_global_scale,
        o.bias,
        o.residual,
        {"mxfp4": space.selectors, "mxfp4_bf16": space.twice, "nvfp4": space.pairs}[o.kernel_format],
        out,
        partials,
        space.counters(tiles) if split else None,
        m,
        n,
        k,
        o.kernel_format,
        tile.packed,
        gx is not None,
        *o.given[1:],
        tile.block_n,
        tile.block_m,
        tile.block_k,
        tile.split_k,
        tile.stages,
        GROUP_M,
        min(128, tile.block_k // 2) if mx and o.precise else 0,
        pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )


def run_hopper(o: Operands, tile: Hopper, out: Tensor) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import hopper_gemm_kernel

    m, n, k = o.sizes
    w_top = row_facts(o.weight_scales).top if o.format == "mxfp4" else None
    # A capture may have just made w_top.
    read = [t for t in (o.weight_codes, o.weight_scales, w_top) if t is not None]
    prefetch = mark_used_and_were_settled(*read)
    x, x_unit, gx = upcast_x(o)
    tiles = triton.cdiv(n, tile.block_n) * triton.cdiv(m, tile.block_m)
    wave = multiprocessors(out.device.index)
    tail, split_k = split_tail(tiles, min(tile.split_k, k // 128), wave)
    partials = torch.empty(tail * tile.block_n * tile.block_m, dtype=torch.float32, device=out.device) if tail else None
    stages = tile.stages - (out.element_size() > 2)  # the tile's results pass through shared memory too
    # A tensor core's product has a power of two of rows: 192 rows are 128 and 64.
    block_m = 1 << tile.block_m.bit_length() - 1
    extra_m = tile.block_m - block_m
    x_tiles = [
        TensorDescriptor.from_tensor(x, [rows, 128], NVMMASharedLayout(128, 8 * x.element_size())) if rows else None
        for rows in (block_m, extra_m)
    ]
    work_items = tiles + tail * (split_k - 1)
    hopper_gemm_kernel[(min(work_items, wave) if tile.warpgroups == 2 else work_items,)](
        *x_tiles,
        x_unit,
        gx,
        TensorDescriptor.from_tensor(
            o.weight_codes.view(torch.int32),
            [tile.block_n, 32 if o.format == "int8" else 16],
            NVMMASharedLayout(128 if o.format == "int8" else 64, 32),
        ),
        o.weight_scales,
        w_top,
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        partials,
        workspace(out.device).counters(tail * tile.warpgroups) if tail else None,
        m,
        work_items,
        tiles - tail,
        split_k,
        int(prefetch),
        n,
        k,
        o.kernel_format,
        tile.block_n,
        block_m,
        extra_m,
        tile.warpgroups,
        stages,
        GROUP_M,
        num_warps=4,
        launch_pdl=True,
    )


def run_int4(o: Operands, tile: Int4, out: Tensor) -> None:
    m, n, k = o.sizes
    pdl = overlaps(out.device.index)
    int4_gemm_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        o.codes,
        o.scales,
        o.global_scale,
        o.weight_codes,
        o.weight_scales,
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        m,
        n,
        k,
        *o.given,
        tile.block_n,
        tile.block_m,
        tile.stages,
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def int8_operands(o: Operands) -> tuple[Tensor, Tensor | None]:
    """x as products with weights of 8 bits read it: (16-bit floats [M, K], the unit fp32 [M] of fp8 rows or None)."""
    if o.activation == "fp8":
        return o.codes.view(torch.float8_e4m3fn).to(torch.bfloat16), o.scales.view(-1)
    return o.codes, None


def run_int8_gemv(o: Operands, tile: Int8Gemv, out: Tensor) -> None:
    (_, n, k), (x, unit) = o.sizes, int8_operands(o)
    pdl = overlaps(out.device.index) and mark_used_and_were_settled(o.weight_codes, o.weight_scales)
    int8_gemv_kernel[(triton.cdiv(n, tile.block_n),)](
        x.view(torch.int64),
        unit,
        o.weight_codes.view(torch.int32),
        o.weight_scales,
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        n,
        k,
        tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        unit is not None,
        *o.given[1:],
        tile.block_n,
        min(tile.block_k, max(triton.next_power_of_2(k), 64)),
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def run_int8(o: Operands, tile: Int8, out: Tensor) -> None:
    (m, n, k), (x, unit) = o.sizes, int8_operands(o)
    pdl = overlaps(out.device.index)
    int8_gemm_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        x,
        unit,
        o.weight_codes.view(torch.int8),
        o.weight_scales,
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        m,
        n,
        k,
        unit is not None,
        *o.given[1:],
        tile.block_n,
        tile.block_m,
        tile.block_k,
        tile.stages,
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def run_scaled(o: Operands, tile: Scaled, out: Tensor) -> None:
    m, n, k = o.sizes
    mx = o.format == "mxfp4"
    scale_dtype = torch.uint8 if mx else torch.float8_e4m3fn
    scaled_gemm_kernel[(triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        o.codes,
        o.scales.view(scale_dtype),
        o.global_scale,
        o.weight_codes,
        o.weight_scales.view(scale_dtype),
        o.weight_global_scale,
        o.bias,
        o.residual,
        out,
        m,
        n,
        k,
        32 if mx else 16,
        *o.given,
        tile.block_m,
        tile.block_n,
        tile.block_k,
        tile.stages,
        num_warps=tile.warps,
    )


RUN = {
    Gemv: run_gemv,
    Fused: run_fused,
    Hopper: run_hopper,
    Scaled: run_scaled,
    Int4: run_int4,
    Int8Gemv: run_int8_gemv,
    Int8: run_int8,
}
