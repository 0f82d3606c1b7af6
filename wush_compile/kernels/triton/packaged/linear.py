"""`wush::fp4_linear` in a graph: the launches of `linear.launch`, each for its band of rows, and the library."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....formats import channels
from ..common.memory import Workspace
from ..linear.choose import (
    FUSED_MANY_ROWS,
    GROUP_M,
    Fused,
    Gemv,
    Int4,
    Int8,
    Int8Gemv,
    Scaled,
    choose,
    choose_decoding,
    choose_int8,
    decoded_format,
)
from ..linear.gemm import fused_gemm_kernel
from ..linear.gemv import gemv_kernel
from ..linear.int4 import int4_gemm_kernel
from ..linear.int8 import int8_gemm_kernel, int8_gemv_kernel
from ..linear.scaled import scaled_gemm_kernel
from . import library
from .launches import Known, bands, dense, in_band, launch, outside, tiles
from .operands import lane_order, upcast_bf16, upcast_fp8

# Most rows of the bands between which `choose` changes its mind.
ROWS = (1, 2, 3, 4, 16, 32, 64, 128, 256)
# Arrival counters are shared by all products with split-K that need no more.
COUNTERS = 2**12
TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])


# The product for many rows in bf16 where no branch can hold the library's.
FUSED_MANY_ROWS_BF16 = Fused(128, 128, 128, 1, 8, 3, True)


def has_branches() -> bool:
    """Whether AOTInductor compiles the branches of `torch.cond`. Before 2.13 it reuses their buffers by an estimate for
    another graph, and fails (`EfficientPeakEstimate` in torch/_inductor/codegen/wrapper.py), unless told to reuse
    none."""
    return TORCH >= (2, 13) or not torch._inductor.config.allow_buffer_reuse


class GemvRows(NamedTuple):
    """`gemv` is compiled for a number of rows."""

    tile: Gemv
    rows: int


class Call(NamedTuple):
    """Dense arguments, and what is made once for all bands of rows. All tensors are operands of the branches."""

    x: Tensor  # as `linear.operands.Operands.codes`
    x_scales: Tensor
    gx: Tensor | None
    w: Tensor
    w_scales: Tensor
    gw: Tensor | None
    bias: Tensor | None
    residual: Tensor | None  # [M, N] in out_dtype
    top: Tensor | None  # MXFP4: the largest scale byte of each weight row, uint8 [N]
    selectors: Tensor | None  # of `gemm.fused_gemm_kernel`
    arrivals: Tensor | None  # its counters
    format: str
    activation: str  # activation_format
    decoded: str  # FORMAT of `gemm.fused_gemm_kernel`
    out_dtype: torch.dtype
    known: Known

    @property
    def sizes(self) -> tuple:
        """(M, N, K); M may be a symbol."""
        return self.x.shape[0], self.w.shape[0], channels(self.w, self.format)

    def common(self) -> dict:
        """Arguments of all kernels."""
        _, n, k = self.sizes
        given = dict(gx=self.gx, gw=self.gw, bias=self.bias, residual=self.residual, w=self.w, N=n, K=k)
        flags = dict(SCALED_X=self.gx, SCALED_W=self.gw, BIAS=self.bias, RESIDUAL=self.residual)
        return given | {name: t is not None for name, t in flags.items()}


def _chooser(format: str, activation: str, n: int, k: int, known: Known, fp16: bool, plain: bool) -> Callable:
    """rows -> the kernel that eager takes, but for Gluon's. plain: the library's fp8 product gives the result."""
    if format == "int8":
        return lambda rows: choose_int8(rows, n, k)
    if activation != "same" and fp16:  # whose products need two bf16 terms
        return lambda rows: "bf16"
    decoded = decoded_format(format, activation, known.capability)
    fits = known.fits_e4m3 and plain

    def kernel(rows: int):
        options = dict(capability=known.capability, portable=True, multiprocessors=known.multiprocessors)
        if activation == "same":
            chosen = choose(format, rows, n, k, **options, library=fits)
        else:
            chosen = choose_decoding(decoded, rows, n, k, **options, library=fits or decoded != "mxfp4")
        return GemvRows(chosen, rows) if isinstance(chosen, Gemv) else chosen

    return kernel


def fp4_linear(
    known: Known,
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
    lead, n, k = codes.shape[:-1], weight_codes.shape[0], channels(weight_codes, format)
    late = residual if residual is not None and residual.dtype != out_dtype else None
    decoded = format
    if format != "int8":
        decoded = decoded_format(format, activation_format, known.capability)
    x = codes.reshape(-1, codes.shape[-1])
    plain = out_dtype == torch.bfloat16 and bias is None and n % 16 == 0
    m = x.shape[0]
    chosen = bands(m, _chooser(format, activation_format, n, k, known, x.dtype == torch.float16, plain), ROWS)
    if not has_branches():
        packed = activation_format == "same" and decoded == "nvfp4" and known.capability >= (9, 0)
        chosen = _without_branches(chosen, packed, decoded)
    space, ws = Workspace(x.device), dense(weight_scales)  # the package pass merges equal constants of a program
    fused = [kernel for _, _, kernel in chosen if isinstance(kernel, Fused)]
    split = [
        tiles(n, tile.block_n) * tiles(last if isinstance(m, torch.SymInt) else m, tile.block_m)
        for _, last, tile in chosen
        if isinstance(tile, Fused) and tile.split_k > 1
    ]
    counters = max(COUNTERS, *split) if split else 0
    call = Call(
        x,
        scales.reshape(m, scales.shape[-1]),
        global_scale,
        dense(weight_codes),
        ws,
        None if weight_global_scale is None else weight_global_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None or late is not None else residual.reshape(-1, n).contiguous(),
        ws.amax(-1) if fused and format == "mxfp4" else None,  # see `row_facts` in common/memory.py
        {"mxfp4": space.selectors, "mxfp4_bf16": space.twice, "nvfp4": space.pairs}[decoded] if fused else None,
        torch.zeros(counters, dtype=torch.int32, device=x.device) if split else None,
        format,
        activation_format,
        decoded,
        out_dtype,
        known,
    )
    y = _product(call, chosen).view(*lead, n)
    return y if late is None else y + late


def _without_branches(chosen: list[tuple], packed: bool, decoded: str) -> list[tuple]:
    """The bands with launches in place of the library; or the library alone, where no kernel takes so many rows."""
    if len({isinstance(kernel, str) for _, _, kernel in chosen}) == 1:
        return chosen
    if decoded == "int8":
        many = next(kernel for _, _, kernel in reversed(chosen) if isinstance(kernel, Int8))
    elif not any(isinstance(kernel, Fused) for _, _, kernel in chosen):
        return [(1, None, "bf16")]
    else:
        many = FUSED_MANY_ROWS if decoded == "mxfp4" else FUSED_MANY_ROWS_BF16._replace(packed=packed)
    return [(first, last, many if isinstance(kernel, str) else kernel) for first, last, kernel in chosen]


def _product(call: Call, chosen: list[tuple]) -> Tensor:
    """out [M, N]: the library's product where `chosen` names it, else launches."""
    m = call.sizes[0]
    kernels = [band for band in chosen if not isinstance(band[2], str)]
    names = {kernel for _, _, kernel in chosen if isinstance(kernel, str)}
    if not names:
        return _launches(call, kernels)
    (name,) = names
    if not kernels:
        return library.product(call, name)
    places = [i for i, field in enumerate(call) if isinstance(field, Tensor)]

    def branch(make: Callable) -> Callable:
        """A function of the call's tensors, since a branch may use no others."""

        def run(*tensors):
            fields = list(call)
            for i, t in zip(places, tensors):
                fields[i] = t
            return (make(Call(*fields)),)

        return run

    many = branch(lambda call: library.product(call, name))
    few = branch(lambda call: _launches(call, kernels))
    elsewhere = outside(m, [band[:2] for band in kernels], kernels[-1][1])
    return torch.ops.higher_order.cond(elsewhere, many, few, tuple(call[i] for i in places))[0]


def _launches(call: Call, chosen: list[tuple]) -> Tensor:
    """out [M, N] by kernels, each with its first and last number of rows."""
    m, n, _ = call.sizes
    out = call.x.new_empty((m, n), dtype=call.out_dtype)
    for first, last, tile in chosen:
        out = _LAUNCH[type(tile)](call, tile, first, last, out)
    return out


def _gemv(call: Call, kernel: GemvRows, first, last, out: Tensor) -> Tensor:
    (m, n, k), tile = call.sizes, kernel.tile
    return launch(
        gemv_kernel,
        ("out",),
        (in_band(m, first, last) * (m // kernel.rows) * tiles(n, tile.block_n),),  # empty for no rows
        tile.warps,
        **call.common() | {"w": call.w.view(torch.int32)},
        x=call.x.view(torch.int32),
        x_scales=call.x_scales,
        w_scales=call.w_scales,
        out=out,
        M=kernel.rows,
        FORMAT=call.format,
        BLOCK_N=tile.block_n,
        BLOCK_K=min(tile.block_k, max(triton.next_power_of_2(k), 128)),
    )["out"]


def _scaled(call: Call, tile: Scaled, first, last, out: Tensor) -> Tensor:
    (m, n, _), mx = call.sizes, call.format == "mxfp4"
    kind = torch.uint8 if mx else torch.float8_e4m3fn
    return launch(
        scaled_gemm_kernel,
        ("out",),
        (in_band(m, first, last) * tiles(m, tile.block_m) * tiles(n, tile.block_n),),
        tile.warps,
        **call.common(),
        x=call.x,
        x_scales=call.x_scales.view(kind),
        w_scales=call.w_scales.view(kind),
        out=out,
        M=m,
        G=32 if mx else 16,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        STAGES=tile.stages,
    )["out"]


def _int4(call: Call, tile: Int4, first, last, out: Tensor) -> Tensor:
    m, n, _ = call.sizes
    return launch(
        int4_gemm_kernel,
        ("out",),
        (in_band(m, first, last) * tiles(m, tile.block_m) * tiles(n, tile.block_n),),
        tile.warps,
        **call.common(),
        x=call.x,
        x_scales=call.x_scales,
        w_scales=call.w_scales,
        out=out,
        M=m,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        STAGES=tile.stages,
    )["out"]


def _int8_operands(call: Call) -> tuple[Tensor, dict]:
    """x in 16 bits, and arguments of both kernels of weights of 8 bits."""
    _, n, k = call.sizes
    fp8 = call.activation == "fp8"
    given = dict(unit=call.x_scales.reshape(-1) if fp8 else None, w_scales=call.w_scales, N=n, K=k, UNIT=fp8)
    given |= dict(gw=call.gw, bias=call.bias, residual=call.residual, SCALED_W=call.gw is not None)
    given |= dict(BIAS=call.bias is not None, RESIDUAL=call.residual is not None)
    return call.x.view(torch.float8_e4m3fn).to(torch.bfloat16) if fp8 else call.x, given


def _int8_gemv(call: Call, tile: Int8Gemv, first, last, out: Tensor) -> Tensor:
    (m, n, k), (x, given) = call.sizes, _int8_operands(call)
    return launch(
        int8_gemv_kernel,
        ("out",),
        (in_band(m, first, last) * m * tiles(n, tile.block_n),),  # empty for no rows
        tile.warps,
        **given,
        x=x.view(torch.int64),
        w=call.w.view(torch.int32),
        out=out,
        X=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        BLOCK_N=tile.block_n,
        BLOCK_K=min(tile.block_k, max(triton.next_power_of_2(k), 64)),
    )["out"]


def _int8(call: Call, tile: Int8, first, last, out: Tensor) -> Tensor:
    (m, n, _), (x, given) = call.sizes, _int8_operands(call)
    return launch(
        int8_gemm_kernel,
        ("out",),
        (in_band(m, first, last) * tiles(m, tile.block_m) * tiles(n, tile.block_n),),
        tile.warps,
        **given,
        x=x,
        w=call.w.view(torch.int8),
        out=out,
        M=m,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        STAGES=tile.stages,
    )["out"]


def _expanded(call: Call, many: bool, here) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`linear.launch.upcast_x`."""
    unit = call.x_scales.reshape(-1) if call.activation == "fp8" else None
    if call.activation != "same":
        x = lane_order(call.x, "lanes" if call.decoded == "mxfp4" else "bf16", many=many, here=here)
        return x, unit, call.gx
    if call.decoded == "mxfp4":
        return *upcast_fp8(call.x, call.x_scales, call.gx, lane_order=True, many=many, here=here), None
    x = upcast_bf16(call.x, call.x_scales, None, call.format, lane_order=True, many=many, here=here)
    return x, None, call.gx


def _many(call: Call, last: int | None) -> bool:
    """Whether eager would expand so many rows in the form for many."""
    least = 512 if call.activation == "same" and call.decoded == "mxfp4" else 65
    return last is None or last >= least


def _fused(call: Call, tile: Fused, first, last, out: Tensor) -> Tensor:
    m, n, _ = call.sizes
    here, most = in_band(m, first, last), m if last is None else last
    x, unit, gx, partials, arrivals = call.x, None, call.gx, None, None
    if not tile.packed:
        x, unit, gx = _expanded(call, _many(call, last), here)
    if tile.split_k > 1:  # sized for the band: M may be far larger
        partials, arrivals = x.new_empty((tile.split_k, most, n), dtype=torch.float32), call.arrivals
    # `arrivals` is zero again when the kernel ends. So it is not an output, and all products of a program can share it.
    return launch(
        fused_gemm_kernel,
        ("out", "partials"),
        (here * tiles(n, tile.block_n) * tiles(m, tile.block_m), tile.split_k),
        tile.warps,
        tile.stages,
        **call.common() | dict(gx=gx, SCALED_X=gx is not None),
        x=x,
        x_scales=call.x_scales.view(torch.int32) if tile.packed else None,
        x_unit=unit,
        w_scales=call.w_scales.view(torch.int32),
        w_top=call.top,
        selectors=call.selectors,
        out=out,
        partials=partials,
        arrivals=arrivals,
        M=m,
        FORMAT=call.decoded,
        PACKED=tile.packed,
        BLOCK_N=tile.block_n,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        STAGES=tile.stages,
        GROUP_M=GROUP_M,
    )["out"]


_LAUNCH = {
    GemvRows: _gemv,
    Fused: _fused,
    Scaled: _scaled,
    Int4: _int4,
    Int8Gemv: _int8_gemv,
    Int8: _int8,
}
