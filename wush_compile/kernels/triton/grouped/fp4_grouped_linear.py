"""`wush::fp4_grouped_linear` in Triton: arguments, choice of a kernel (`choose.py`), launches."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ....formats import FORMATS, operand_layout
from ..common.memory import multiprocessors, row_facts, scale_words, workspace
from ..common.overlap import overlaps
from ..linear.choose import Gemv, Scaled, give_up_gluon, precise_by_default
from ..linear.fp4_linear import capability, of_cuda
from ..linear.lane_order import bf16_order, fp8_order
from ..linear.operands import dense
from ..linear.upcast import upcast_bf16, upcast_fp8
from . import upcast
from .choose import REGISTERS, Gemm, Hopper, choose, grouped_format
from .find import most_tiles, tile_table_kernel
from .gemm import grouped_gemm_kernel
from .gemv import grouped_gemv_kernel
from .scaled import grouped_scaled_kernel


class Operands(NamedTuple):
    """Dense arguments."""

    codes: Tensor  # uint8 [T, K/2]; activation fp8: uint8 [T, K]; none: bf16 [T, K]
    scales: Tensor  # uint8 [T, K/G]; activation fp8: fp32 [T, 1]; none: fp32 [T, 0]
    global_scale: Tensor | None  # fp32 [1]
    weight_codes: Tensor  # uint8 [E, N, K/2]
    weight_scales: Tensor  # uint8 [E, N, K/G]
    weight_global_scale: Tensor | None  # fp32 [E]
    offs: Tensor  # int32 [E]
    bias: Tensor | None  # [E, N]
    index: Tensor | None  # int32 or int64 [S]
    format: str
    activation: str  # the op's activation_format
    precise: bool

    @property
    def rows(self) -> int:
        """S."""
        return (self.codes if self.index is None else self.index).shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        experts, n, half = self.weight_codes.shape
        return experts, n, 2 * half

    @property
    def kernel_format(self) -> str:
        """What the weight is decoded to for a tensor core, as FORMAT of the kernels."""
        return grouped_format(self.format, self.activation, capability(self.codes.device.index))

    @property
    def top(self) -> Tensor | None:
        """MXFP4: the largest scale byte of every weight row, uint8 [E * N]."""
        return row_facts(self.weight_scales.flatten(0, 1)).top if self.format == "mxfp4" else None

    @property
    def given(self) -> tuple[bool, bool, bool]:
        """SCALED_X, SCALED_W, BIAS of the kernels."""
        return tuple(t is not None for t in (self.global_scale, self.weight_global_scale, self.bias))


def supports(format: str, k: int, dtype: torch.dtype, activation: str) -> str | None:
    """Why these kernels do not take a product of width k with such activations; None if they do."""
    if format in ("int4", "int8"):
        return f"{format} has no grouped product"
    if k % 32:
        return f"width {k} is not a multiple of 32"
    if activation == "none" and dtype != torch.bfloat16:
        return f"activations of {dtype} have no grouped product"
    return None


def check(o: Operands) -> None:
    """ValueError if an operand's shape, dtype or device would make a kernel read memory that is not its own."""
    (experts, n, k), fmt, rows = o.sizes, FORMATS[o.format], o.codes.shape[0]
    written = o.format if o.activation == "same" else o.activation
    columns, codes_dtype, groups, scale_dtype = operand_layout(written, k, o.codes.dtype)
    expected = {
        "codes": ((rows, columns), codes_dtype),
        "scales": ((rows, groups), scale_dtype),
        "weight_scales": ((experts, n, k // fmt.group_size), fmt.scale_dtype),
        "weight_codes": ((experts, n, k // 2), torch.uint8),
        "global_scale": ((1,), torch.float32),
        "weight_global_scale": ((experts,), torch.float32),
        "offs": ((experts,), torch.int32),
        "bias": ((experts, n), None),
        "index": ((o.rows,), None),
    }
    for name, (shape, dtype) in expected.items():
        t = getattr(o, name)
        if t is None:
            continue
        if t.device != o.codes.device:
            raise ValueError(f"{name} is on {t.device}, the activation on {o.codes.device}")
        if tuple(t.shape) != shape and not (shape == (1,) and t.numel() == 1):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, the product needs {shape}")
        if dtype is not None and t.dtype != dtype:
            raise ValueError(f"{name} is {t.dtype}, {o.format} needs {dtype}")
    if o.index is not None and o.index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index is {o.index.dtype}, not an integer type")


def upcast_rows(o: Operands) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of x, gathered, as the tensor-core products read them: (fp8 or bf16 [S, K up to a multiple of 128] in
    lane order, its unit [S] or None, the global scale that is left to divide by)."""
    fp8 = o.kernel_format == "mxfp4"
    if o.activation != "same":
        x, unit = (fp8_order if fp8 else bf16_order)(o.codes, index=o.index), None
        if o.activation == "fp8":
            unit = o.scales.view(-1) if o.index is None else o.scales.view(-1)[o.index]
        return x, unit, o.global_scale
    if fp8 and o.rows >= upcast.MANY_ROWS:
        x, unit = upcast.upcast_many(o.codes, o.scales, o.global_scale, o.index)
        return x, unit, None
    if fp8:
        x, unit = upcast_fp8(o.codes, o.scales, o.global_scale, e4m3=False, lane_order=True, index=o.index)
        return x, unit, None
    x = upcast_bf16(o.codes, o.scales, None, o.format, lane_order=True, index=o.index)
    return x, None, o.global_scale


def run_gemv(o: Operands, tile: Gemv, out: Tensor) -> None:
    experts, n, k = o.sizes
    pdl = overlaps(out.device.index)
    grouped_gemv_kernel[(triton.cdiv(n, tile.block_n), o.rows)](
        o.codes.view(torch.int32),
        o.scales,
        o.global_scale,
        o.index,
        o.weight_codes.view(torch.int32),
        o.weight_scales,
        o.weight_global_scale,
        o.offs,
        o.bias,
        out,
        o.codes.shape[0],
        n,
        k,
        experts,
        triton.next_power_of_2(experts),
        o.format,
        *o.given,
        tile.block_n,
        min(tile.block_k, max(triton.next_power_of_2(k), 128)),
        pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


def run_gemm(o: Operands, tile: Gemm, out: Tensor) -> None:
    (experts, n, k), space = o.sizes, workspace(out.device)
    x, x_unit, gx = upcast_rows(o)
    pdl = overlaps(out.device.index)
    grouped_gemm_kernel[(most_tiles(o.rows, experts, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        x,
        x_unit,
        gx,
        o.weight_codes,
        scale_words(o.weight_scales),
        o.top,
        o.weight_global_scale,
        o.offs,
        o.bias,
        {"mxfp4": space.selectors, "mxfp4_bf16": space.twice, "nvfp4": space.pairs}[o.kernel_format],
        out,
        o.rows,
        n,
        k,
        experts,
        triton.next_power_of_2(experts),
        o.kernel_format,
        gx is not None,
        *o.given[1:],
        tile.block_n,
        tile.block_m,
        tile.block_k,
        tile.stages,
        min(128, tile.block_k // 2) if o.kernel_format == "mxfp4" and o.precise else 0,
        pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )


def run_hopper(o: Operands, tile: Hopper, out: Tensor) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import grouped_hopper_kernel

    experts, n, k = o.sizes
    slots, power = most_tiles(o.rows, experts, tile.block_m), triton.next_power_of_2(experts)
    some = max(1, min(64, 8192 // power))  # slots that a program of the table looks up
    table = torch.empty((slots, 4), dtype=torch.int32, device=out.device)
    tile_table_kernel[(triton.cdiv(slots, some),)](
        o.offs, table, out, o.rows, slots, n, experts, power, tile.block_m, some, True, num_warps=4, launch_pdl=True
    )
    x, x_unit, gx = upcast_rows(o)
    launched, second = REGISTERS[tile.programs]
    stages = tile.stages - (out.element_size() > 2)  # the tile's results pass through shared memory too
    words = o.weight_codes.view(torch.int32).flatten(0, 1)
    tiles = slots * triton.cdiv(n, tile.block_n)
    grouped_hopper_kernel[(min(tiles, multiprocessors(out.device.index) * tile.programs),)](
        TensorDescriptor.from_tensor(x, [tile.block_m, 128], NVMMASharedLayout(128, 8 * x.element_size())),
        x_unit,
        gx,
        TensorDescriptor.from_tensor(words, [tile.block_n, 16], NVMMASharedLayout(64, 32)),
        o.weight_scales,
        o.top,
        o.weight_global_scale,
        o.bias,
        table,
        out,
        tiles,
        n,
        k,
        experts,
        o.kernel_format,
        tile.block_n,
        tile.block_m,
        stages,
        second,
        num_warps=4,
        maxnreg=launched,
        launch_pdl=True,
    )


def run_scaled(o: Operands, tile: Scaled, out: Tensor) -> None:
    experts, n, k = o.sizes
    mx = o.format == "mxfp4"
    scale_dtype = torch.uint8 if mx else torch.float8_e4m3fn
    grouped_scaled_kernel[(most_tiles(o.rows, experts, tile.block_m) * triton.cdiv(n, tile.block_n),)](
        o.codes,
        o.scales.view(scale_dtype),
        o.global_scale,
        o.index,
        o.weight_codes,
        o.weight_scales.view(scale_dtype),
        o.weight_global_scale,
        o.offs,
        o.bias,
        out,
        o.rows,
        o.codes.shape[0],
        n,
        k,
        experts,
        triton.next_power_of_2(experts),
        32 if mx else 16,
        *o.given,
        tile.block_m,
        tile.block_n,
        tile.block_k,
        tile.stages,
        num_warps=tile.warps,
    )


RUN = {Gemv: run_gemv, Gemm: run_gemm, Hopper: run_hopper, Scaled: run_scaled}


def fp4_grouped_linear(
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
    activation_format: str = "same",
    index: Tensor | None = None,
    kernel: Gemv | Gemm | Hopper | Scaled | None = None,
    precise: bool | None = None,
) -> Tensor:
    """`wush::fp4_grouped_linear` (docs/spec.md §6): codes [T, K/2], or their rows index [S], times the weights of their
    experts [E, N, K/2], transposed -> [S, N].

    kernel: a tile instead of what `choose` takes. precise: as in `linear.fp4_linear`.
    ValueError if an operand's shape, dtype or device does not fit."""
    o = Operands(
        dense(codes),
        dense(scales),
        global_scale,
        dense(weight_codes),
        dense(weight_scales),
        None if weight_global_scale is None else weight_global_scale.contiguous(),
        offs.contiguous(),
        None if bias is None else bias.contiguous(),
        None if index is None else index.contiguous(),
        format,
        activation_format,
        precise_by_default() if precise is None else precise,
    )
    check(o)
    experts, n, k = o.sizes
    out = torch.empty((o.rows, n), dtype=out_dtype, device=codes.device)
    if out.numel() == 0:
        return out
    if codes.shape[0] == 0:
        raise ValueError(f"index names {o.rows} rows of a tensor without rows")
    device = capability(codes.device.index)
    chosen = kernel or choose(o.kernel_format, activation_format, o.rows, experts, n, k, device, o.precise)
    try:
        RUN[type(chosen)](o, chosen, out)
    except Exception as error:
        if kernel is not None or not isinstance(chosen, Hopper) or of_cuda(error):
            raise
        give_up_gluon(error)
        choose.cache_clear()
        RUN[Gemm](o, choose(o.kernel_format, activation_format, o.rows, experts, n, k, device, o.precise), out)
    return out
