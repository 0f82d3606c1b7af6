"""`wush::fp4_linear` in Triton: the launches of all kernels. Which one takes which shape: triton_choose.py

    gemv     1, 2 or 4 rows: exact integer products of groups                              triton_gemv.py
    fused    weights decoded in registers in front of the tensor core                      triton_gemm.py
    hopper   the same for many rows, copied and decoded while the tensor core works        triton_hopper.py
    library  both operands expanded to fp8 in memory that is reused, then cuBLASLt         triton_expand.py
    bf16     both operands expanded to bf16, cuBLAS: any width, any scale, the last resort triton_expand.py
    scaled   Blackwell's own FP4 instruction                                               triton_scaled.py
    int4     exact integer products of groups on int8 tensor cores                         triton_int4.py

All take the canonical layout: codes [.., K/2] and scales [.., K/G], row-major. A weight needs nothing prepared but, for
MXFP4, the largest scale byte of every row (N bytes), which is found once and remembered with the tensor's memory.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....formats import FORMATS
from ..common.memory import Workspace, is_power_of_two, row_facts, mark_used_and_was_settled, workspace
from ..common.overlap import overlaps
from .choose import Fused, Gemv, Hopper, Int4, Scaled, choose, give_up_gluon, parts, precise_by_default
from .expand import expand_bf16_kernel, expand_both_kernel, expand_fp8_kernel
from .gemm import fused_gemm_kernel
from .gemv import gemv_kernel
from .int4 import int4_gemm_kernel
from .scaled import scaled_gemm_kernel

# Memory that one call may take for expanded weights; a larger weight goes to the library in parts.
SCRATCH_BYTES = 2**28


class Operands(NamedTuple):
    """Arguments of `wush::fp4_linear` with the leading dimensions of x and the residual as one."""

    codes: Tensor  # uint8 [M, K/2]
    scales: Tensor  # uint8 [M, K/G]; int4: bf16
    gx: Tensor | None
    w_codes: Tensor  # uint8 [N, K/2]
    w_scales: Tensor  # as scales [N, K/G]
    gw: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mx: bool
    precise: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.codes.shape[0], self.w_codes.shape[0], 2 * self.codes.shape[1]

    @property
    def flags(self) -> tuple[bool, bool, bool, bool]:
        return self.gx is not None, self.gw is not None, self.bias is not None, self.residual is not None


def run_gemv(o: Operands, tile: Gemv, out: Tensor) -> None:
    m, n, k = o.sizes
    bk = min(tile.bk, max(triton.next_power_of_2(k), 128))
    pdl = overlaps(out.device.index) and mark_used_and_was_settled(o.w_codes) and mark_used_and_was_settled(o.w_scales)
    gemv_kernel[(triton.cdiv(n, tile.bn),)](
        o.codes.view(torch.int32),
        o.scales,
        o.gx,
        o.w_codes.view(torch.int32),
        o.w_scales,
        o.gw,
        o.bias,
        o.residual,
        out,
        n,
        k,
        m,
        o.mx,
        *o.flags,
        tile.bn,
        bk,
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def expand_fp8(
    codes: Tensor, scales: Tensor, g: Tensor | None, e4m3: bool, lanes: bool = False
) -> tuple[Tensor, Tensor]:
    """MXFP4 rows -> (fp8 bytes [rows, K], channels in one of the kernel's orders, unit fp32 [rows], which holds 1/g)."""
    rows, k = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty((rows, k), dtype=torch.float8_e4m3fn if e4m3 else torch.float8_e5m2, device=codes.device)
    unit = torch.empty(rows, dtype=torch.float32, device=codes.device)
    groups = triton.next_power_of_2(k // 32)
    step = min(groups, 128 if rows >= 512 else 32)  # few rows: several programs for each
    expand_fp8_kernel[(rows, 1 if rows >= 512 else triton.cdiv(k // 32, step))](
        codes.view(torch.int32),
        scales,
        g,
        unit,
        out.view(torch.int32),
        k,
        groups,
        e4m3,
        g is not None,
        step,
        lanes,
        overlaps(codes.device.index),
        num_warps=4,
        launch_pdl=overlaps(codes.device.index),
    )
    return out, unit


def expand_x(o: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x as the products that decode weights read it (e5m2 or bf16 [M, K], in panels), its unit [M] or None, and the global
    scale that is left to divide by."""
    if o.mx:
        return *expand_fp8(o.codes, o.scales, o.gx, e4m3=False, lanes=True), None
    return expand_bf16(o.codes, o.scales, None, o.mx, panels=True), None, o.gx


def run_fused(o: Operands, tile: Fused, out: Tensor) -> None:
    m, n, k = o.sizes
    space = workspace(out.device)
    x, unit, gx = (o.codes, None, o.gx) if tile.packed else expand_x(o)
    tiles = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    if tiles > Workspace.RING:
        tile = tile._replace(split=1)
    # Programs that start early, while the quantizer's still run, crowd on the multiprocessors that are free: only behind an
    # expansion, which lets the next kernel start when it ends, is it worth it.
    split, pdl = tile.split > 1, not tile.packed and overlaps(out.device.index)
    parts = torch.empty((tile.split, m, n), dtype=torch.float32, device=out.device) if split else None
    fused_gemm_kernel[(tiles, tile.split)](
        x,
        o.scales.view(torch.int32) if tile.packed else None,
        unit,
        gx,
        o.w_codes,
        o.w_scales.view(torch.int32),
        row_facts(o.w_scales).top if o.mx else None,
        o.gw,
        o.bias,
        o.residual,
        space.selectors if o.mx else space.pairs,
        out,
        parts,
        space.counters(tiles) if split else None,
        m,
        n,
        k,
        o.mx,
        tile.packed,
        gx is not None,
        *o.flags[1:],
        tile.bn,
        tile.bm,
        tile.bk,
        tile.split,
        tile.stages,
        8,
        min(128, tile.bk // 2) if o.mx and o.precise else 0,
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
    top = row_facts(o.w_scales).top if o.mx else None
    # A list: each is looked at, and so used. Inside a capture `top` may be made by the kernel in front.
    early = all([mark_used_and_was_settled(t) for t in (o.w_codes, o.w_scales, top) if t is not None])  # noqa: C419
    x, unit, gx = expand_x(o)
    tiles = triton.cdiv(n, tile.bn) * triton.cdiv(m, tile.bm)
    full = multiprocessors(out.device.index)
    tail, split = parts(tiles, min(tile.split, k // 128), full)
    sums = torch.empty(tail * tile.bn * tile.bm, dtype=torch.float32, device=out.device) if tail else None
    stages = tile.stages - (out.element_size() > 2)  # the tile's results pass through shared memory too
    # Rows of a tensor core's product are powers of two: 192 are 128 and 64.
    bm = 1 << tile.bm.bit_length() - 1
    more = tile.bm - bm
    rows_of_x = [
        TensorDescriptor.from_tensor(x, [rows, 128], NVMMASharedLayout(128, 8 * x.element_size())) if rows else None
        for rows in (bm, more)
    ]
    pieces = tiles + tail * (split - 1)
    hopper_gemm_kernel[(min(pieces, full) if tile.warpgroups == 2 else pieces,)](
        *rows_of_x,
        unit,
        gx,
        TensorDescriptor.from_tensor(o.w_codes.view(torch.int32), [tile.bn, 16], NVMMASharedLayout(64, 32)),
        o.w_scales,
        top,
        o.gw,
        o.bias,
        o.residual,
        out,
        sums,
        workspace(out.device).counters(tail * tile.warpgroups) if tail else None,
        m,
        pieces,
        tiles - tail,
        split,
        int(early),
        n,
        k,
        o.mx,
        tile.bn,
        bm,
        more,
        tile.warpgroups,
        stages,
        8,
        num_warps=4,
        launch_pdl=True,
    )


def run_int4(o: Operands, tile: Int4, out: Tensor) -> None:
    m, n, k = o.sizes
    pdl = overlaps(out.device.index)
    int4_gemm_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)](
        o.codes,
        o.scales,
        o.gx,
        o.w_codes,
        o.w_scales,
        o.gw,
        o.bias,
        o.residual,
        out,
        m,
        n,
        k,
        *o.flags,
        tile.bn,
        tile.bm,
        tile.stages,
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def run_scaled(o: Operands, tile: Scaled, out: Tensor) -> None:
    m, n, k = o.sizes
    kind = torch.uint8 if o.mx else torch.float8_e4m3fn
    scaled_gemm_kernel[(triton.cdiv(m, tile.bm) * triton.cdiv(n, tile.bn),)](
        o.codes,
        o.scales.view(kind),
        o.gx,
        o.w_codes,
        o.w_scales.view(kind),
        o.gw,
        o.bias,
        o.residual,
        out,
        m,
        n,
        k,
        32 if o.mx else 16,
        *o.flags,
        tile.bm,
        tile.bn,
        tile.bk,
        tile.stages,
        num_warps=tile.warps,
    )


def _parts(n: int, row_bytes: int) -> list[slice]:
    """Rows of a weight in parts whose expansion fits the scratch."""
    step = max(SCRATCH_BYTES // row_bytes // 256 * 256, 256)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def expand_both(o: Operands, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x in e5m2 [M, K], its unit [M], those rows of w in e4m3 and their unit: `expand_fp8` of both in one launch."""
    w_codes, w_scales = o.w_codes[rows], o.w_scales[rows]
    (m, _, k), n, device = o.sizes, w_codes.shape[0], o.codes.device
    x = torch.empty((m, k), dtype=torch.float8_e5m2, device=device)
    w = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=device)
    x_unit, w_unit = (torch.empty(size, dtype=torch.float32, device=device) for size in (m, n))
    groups, pdl = triton.next_power_of_2(k // 32), overlaps(device.index)
    expand_both_kernel[(m + n,)](
        o.codes.view(torch.int32),
        o.scales,
        o.gx,
        x_unit,
        x.view(torch.int32),
        w_codes.view(torch.int32),
        w_scales,
        o.gw,
        w_unit,
        w.view(torch.int32),
        m,
        k,
        groups,
        o.gx is not None,
        o.gw is not None,
        min(groups, 128),
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return x, x_unit, w, w_unit


def run_library(o: Operands) -> Tensor:
    """bf16 [M, N]; without a bias, since the library rounds before it could be added."""
    m, n, k = o.sizes
    y = torch.empty((m, n), dtype=torch.bfloat16, device=o.codes.device)
    for rows in _parts(n, k):
        x, x_unit, w, w_unit = expand_both(o, rows)
        torch._scaled_mm(
            x,
            w.t(),
            x_unit[:, None],
            w_unit[None, :],
            out_dtype=torch.bfloat16,
            use_fast_accum=not o.precise,
            out=y[:, rows],
        )
    return y if o.residual is None else y.add_(o.residual)


def expand_bf16(codes: Tensor, scales: Tensor, g: Tensor | None, mx: bool, panels: bool = False) -> Tensor:
    """Packed rows -> bf16 [rows, K], exact if g, by which they are divided, is a power of two; `panels` as in the kernel."""
    rows, k = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty((rows, k), dtype=torch.bfloat16, device=codes.device)
    block, pdl = 1 if rows <= 64 else 8, overlaps(codes.device.index)
    expand_bf16_kernel[(triton.cdiv(rows, block), triton.cdiv(k, 1024))](
        codes,
        scales,
        g,
        out,
        rows,
        k,
        mx,
        g is not None,
        block,
        512,
        panels,
        pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out


def run_bf16(o: Operands, out_dtype: torch.dtype) -> Tensor:
    m, n, k = o.sizes
    # The library's own rounding is the only one where nothing but powers of two comes after the sum.
    direct = out_dtype == torch.bfloat16 and o.bias is None and is_power_of_two(o.gx) and is_power_of_two(o.gw)
    x = expand_bf16(o.codes, o.scales, o.gx if direct else None, o.mx)
    y = torch.empty((m, n), dtype=torch.bfloat16 if direct else torch.float32, device=x.device)
    for rows in _parts(n, 2 * k):
        w = expand_bf16(o.w_codes[rows], o.w_scales[rows], o.gw if direct else None, o.mx)
        if direct:
            torch.mm(x, w.t(), out=y[:, rows])
        else:
            y[:, rows] = torch.mm(x, w.t(), out_dtype=torch.float32)
    if not direct:
        g = o.gx if o.gw is None else o.gw if o.gx is None else o.gx * o.gw
        if g is not None:
            y = y * (1.0 / g)
        if o.bias is not None:
            y = y + o.bias.to(torch.float32)
        y = y.to(out_dtype)
    return y if o.residual is None else y + o.residual


def check(o: Operands, format: str, out_dtype: torch.dtype) -> None:
    """ValueError if an operand's shape, dtype or device would make a kernel read what is not its own."""
    (m, n, k), fmt = o.sizes, FORMATS[format]
    expected = {
        "codes": (o.codes, (m, k // 2), torch.uint8),
        "scales": (o.scales, (m, k // fmt.group_size), fmt.scale_dtype),
        "weight_codes": (o.w_codes, (n, k // 2), torch.uint8),
        "weight_scales": (o.w_scales, (n, k // fmt.group_size), fmt.scale_dtype),
        "global_scale": (o.gx, (1,), torch.float32),
        "weight_global_scale": (o.gw, (1,), torch.float32),
        "bias": (o.bias, (n,), None),
        "residual": (o.residual, (m, n), out_dtype),
    }
    for name, (t, shape, dtype) in expected.items():
        if t is None:
            continue
        if t.device != o.codes.device:
            raise ValueError(f"{name} is on {t.device}, the activation on {o.codes.device}")
        if tuple(t.shape) != shape and not (shape == (1,) and t.numel() == 1):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, the product needs {shape}")
        if t.dtype != dtype and (dtype is not None or not t.is_floating_point()):
            raise ValueError(f"{name} is {t.dtype}, {format} needs {dtype or 'a floating-point type'}")


def fp4_linear(
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
    kernel: Gemv | Fused | Hopper | Scaled | Int4 | str | None = None,
    precise: bool | None = None,
) -> Tensor:
    """`wush::fp4_linear` (SPEC §6); `kernel` overrides `choose`. precise (default: what `WUSH_PRECISE` says): MXFP4 sums
    go from the tensor core's fp8 accumulator, which drops bits, to fp32 at least every 128 channels."""
    precise = precise_by_default() if precise is None else precise
    n, k = weight_codes.shape[0], 2 * weight_codes.shape[1]
    shape = (*codes.shape[:-1], n)
    flat = codes.reshape(-1, k // 2)
    if flat.shape[0] == 0 or n == 0:
        return torch.empty(shape, dtype=out_dtype, device=codes.device)
    if residual is not None and residual.dtype != out_dtype:
        y = fp4_linear(
            codes,
            scales,
            global_scale,
            weight_codes,
            weight_scales,
            weight_global_scale,
            bias,
            None,
            format,
            out_dtype,
            kernel,
            precise,
        )
        return y + residual
    o = Operands(
        _dense(flat),
        _dense(scales.reshape(flat.shape[0], -1)),
        global_scale,
        _dense(weight_codes),
        _dense(weight_scales),
        weight_global_scale,
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.reshape(-1, n).contiguous(),
        format == "mxfp4",
        precise,
    )
    check(o, format, out_dtype)
    device = codes.device.index
    shape_of = format, flat.shape[0], n, k, capability(device), precise
    chosen = kernel or choose(*shape_of, multiprocessors=multiprocessors(device))
    if chosen == "library" and (
        out_dtype != torch.bfloat16 or bias is not None or n % 16 or not row_facts(o.w_scales).fits_e4m3
    ):
        chosen = choose(*shape_of, multiprocessors=multiprocessors(device), library=False)
    if isinstance(chosen, str):
        y = run_library(o) if chosen == "library" else run_bf16(o, out_dtype)
        return y.view(shape)
    out = torch.empty((flat.shape[0], n), dtype=out_dtype, device=codes.device)
    try:
        RUN[type(chosen)](o, chosen, out)
    except Exception as error:
        # A CUDA error may be an earlier kernel's, and leaves nothing that could still compute.
        of_cuda = isinstance(error, torch.AcceleratorError | torch.OutOfMemoryError) or "Triton Error [CUDA]" in str(
            error
        )
        if kernel is not None or not isinstance(chosen, Hopper) or of_cuda:
            raise
        give_up_gluon(error)
        return fp4_linear(
            codes,
            scales,
            global_scale,
            weight_codes,
            weight_scales,
            weight_global_scale,
            bias,
            residual,
            format,
            out_dtype,
            None,
            precise,
        )
    return out.view(shape)


RUN = {Gemv: run_gemv, Fused: run_fused, Hopper: run_hopper, Scaled: run_scaled, Int4: run_int4}


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def multiprocessors(device: int) -> int:
    """How many a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense(t: Tensor) -> Tensor:
    """`t` contiguous and aligned for 16-byte loads."""
    return t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format)


def supports(format: str, k: int) -> str | None:
    """Why these kernels do not take a product of width k; None if they do."""
    return None if k % FORMATS[format].group_size == 0 else f"width {k} is not a multiple of the group"
