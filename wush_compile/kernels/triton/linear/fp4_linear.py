"""`wush::fp4_linear` in Triton: arguments, choice of a kernel (`choose.py`), fallbacks.

gemv     1, 2 or 4 rows: exact integer products of groups                         gemv.py
fused    weights decoded in registers in front of the tensor core                 gemm.py
hopper   the same for many rows, copied and decoded while the tensor core works   hopper.py
library  both operands upcast to fp8 in memory, then cuBLASLt                     library.py
bf16     both operands upcast to bf16, then cuBLAS: any width, any scale          library.py
scaled   Blackwell's own FP4 instruction                                          scaled.py
int4     exact integer products of groups on int8 tensor cores                    int4.py
int8     weights of 8 bits, up to 64 rows                                         int8.py

Activations of 8 or 16 bits (activation_format fp8 or none) take fused, hopper, library and bf16, which then decode only
the weight. MXFP4 times fp8 is a product of e5m2 and e4m3 on Hopper; else both operands are bf16, and exact.
"""

import functools
import logging

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ....formats import get_format
from ..common.memory import multiprocessors, row_facts
from . import tuned
from .choose import (
    PACKED_ROWS,
    Fused,
    Gemv,
    Hopper,
    Int4,
    Int8,
    Int8Gemv,
    Scaled,
    choose,
    choose_decoding,
    choose_int8,
    decoded_format,
    give_up_gluon,
    precise_by_default,
)
from .launch import RUN
from .library import run_bf16, run_library
from .operands import Operands, check, dense

logger = logging.getLogger("wush_compile")


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def supports(format: str, k: int) -> str | None:
    """Why these kernels do not take a product of width k; None if they do."""
    return None if k % get_format(format).group_size == 0 else f"width {k} is not a multiple of the group"


def refuses_lanes(format: str, activation_format: str, codes: Tensor, k: int) -> str | None:
    """Why these kernels do not take activations in the layout `lanes`; None if they do, on Hopper alone."""
    if capability(codes.device.index) != (9, 0) or k % 128:
        return "no product of this device, or of this width, reads the layout lanes"
    taken = {("mxfp4", "fp8"), ("mxfp4", "none"), ("nvfp4", "same"), ("nvfp4", "none")}
    if (format, activation_format) not in taken or codes.dtype not in (torch.uint8, torch.bfloat16):
        return f"{format} times {activation_format} in {codes.dtype} has no layout lanes"
    rows = codes.numel() // max(codes.shape[-1], 1)
    if activation_format == "same" and not statically_known_true(rows > PACKED_ROWS):
        return f"up to {PACKED_ROWS} rows, or an unknown number, stay packed"
    return None


def _fits_library(o: Operands, out_dtype: torch.dtype) -> bool:
    """Whether fp8 products of the library give this call's result."""
    n = o.weight_codes.shape[0]
    plain = out_dtype == torch.bfloat16 and o.bias is None and n % 16 == 0
    return plain and row_facts(o.weight_scales).fits_e4m3


def _choose(o: Operands, out_dtype: torch.dtype) -> Gemv | Fused | Hopper | Scaled | Int4 | Int8Gemv | Int8 | str:
    """What `choose` or `choose_decoding` takes for these operands."""
    device, shape = o.codes.device.index, o.sizes
    if o.format == "int8":
        return choose_int8(*shape)
    options = dict(capability=capability(device), precise=o.precise, multiprocessors=multiprocessors(device))
    if o.activation == "same" and not o.lanes:
        chosen = None if o.precise else tuned.lookup(device, o.format, *shape)
        chosen = chosen or choose(o.format, *shape, **options)
        if chosen == "library" and not _fits_library(o, out_dtype):
            chosen = choose(o.format, *shape, **options, library=False)
        return chosen
    if o.codes.dtype == torch.float16:  # whose products need two bf16 terms
        return "bf16"
    # In bf16, the units of e4m3 rows would need sums in fp32 memory: only where no other kernel can.
    library = o.kernel_format == "mxfp4" or o.activation == "none"
    chosen = choose_decoding(o.kernel_format, *shape, **options, library=library)
    if chosen == "library" and not _fits_library(o, out_dtype):
        chosen = choose_decoding(o.kernel_format, *shape, **options, library=False)
    return chosen


def of_cuda(error: Exception) -> bool:
    """Whether the device failed: the error may be an earlier kernel's, and no other kernel could compute after it."""
    cuda_errors = torch.AcceleratorError | torch.OutOfMemoryError
    return isinstance(error, cuda_errors) or "Triton Error [CUDA]" in str(error)


@functools.cache
def _say_slow(format: str, of_device: tuple[int, int]) -> None:
    """Says once a process what activations of 8 bits cost where no tensor core multiplies them with the weights."""
    logger.warning(
        "%s weights with fp8 activations have no fp8 product at compute capability %d.%d: both are decoded to bf16, "
        "which is no faster than activations of 16 bits",
        format,
        *of_device,
    )


def _product(o: Operands, out_dtype: torch.dtype, kernel) -> Tensor:
    """[M, N] by `kernel`, or by the one that `choose` takes."""
    m, n, _ = o.sizes
    chosen = kernel or _choose(o, out_dtype)
    if chosen == "library" and not _fits_library(o, out_dtype):
        chosen = _choose(o, out_dtype)
    if chosen == "library":
        return run_library(o)
    if isinstance(chosen, str):
        return run_bf16(o, out_dtype)
    out = torch.empty((m, n), dtype=out_dtype, device=o.codes.device)
    try:
        RUN[type(chosen)](o, chosen, out)
    except Exception as error:
        if kernel is not None or not isinstance(chosen, Hopper) or of_cuda(error):
            raise
        give_up_gluon(error)
        return _product(o, out_dtype, None)
    return out


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
    kernel: Gemv | Fused | Hopper | Scaled | Int4 | Int8Gemv | Int8 | str | None = None,
    precise: bool | None = None,
    activation_format: str = "same",
    lanes: bool = False,
) -> Tensor:
    """`wush::fp4_linear` (docs/spec.md §6): codes [.., K/2] times weight_codes [N, K/2], transposed -> [.., N].

    kernel: a tile, "library" (where it gives the call's result) or "bf16" instead of what `choose` takes. precise:
    MXFP4 sums go from the tensor core's fp8 accumulator, which drops bits, to fp32 at least every 128 channels;
    default: what `WUSH_PRECISE` says.
    activation_format: fp8 or none for codes [.., K] (`formats.operand_layout`); lanes: the activation is in that layout
    (`ops/layouts.py`).
    ValueError if an operand's shape, dtype or device does not fit."""
    precise = precise_by_default() if precise is None else precise
    n = weight_codes.shape[0]
    shape = (*codes.shape[:-1], n)
    if codes.shape[:-1].numel() == 0 or n == 0:
        return torch.empty(shape, dtype=out_dtype, device=codes.device)
    flat = codes.reshape(-1, codes.shape[-1])
    decoded = ""
    if activation_format == "fp8" and decoded_format(format, "fp8", capability(codes.device.index)) != "mxfp4":
        _say_slow(format, capability(codes.device.index))
    if format != "int8":
        decoded = decoded_format(format, activation_format, capability(codes.device.index))
    # The kernels add a residual in out_dtype. Another one is added to the finished product.
    inside = residual is not None and residual.dtype == out_dtype
    o = Operands(
        dense(flat),
        dense(scales.reshape(flat.shape[0], -1) if scales.numel() else scales.new_empty(flat.shape[0], 0)),
        global_scale,
        dense(weight_codes),
        dense(weight_scales),
        None if weight_global_scale is None else weight_global_scale.contiguous(),
        None if bias is None else bias.contiguous(),
        residual.reshape(-1, n).contiguous() if inside else None,
        format,
        precise,
        activation_format,
        decoded,
        lanes,
    )
    check(o, out_dtype)
    y = _product(o, out_dtype, kernel).view(shape)
    return y if residual is None or inside else y + residual
