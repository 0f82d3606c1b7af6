"""`torch.nn.functional.scaled_mm` (cuBLASLt) as a provider of `wush::fp4_linear`: the vendor's product on Blackwell.

Which formats work depends on the GPU, on torch, and on how torch was built. So each format is tried once on a device: a
small product is compared with the exact one, and the format is refused if it fails or is wrong. Codes go in unchanged.
cuBLASLt reads swizzled scales (`ops/layouts.py`): a weight's are swizzled once and kept with their memory, an
activation's in every call, unless its quantizer has written them swizzled.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from .. import formats
from ..ops.core import PRODUCT_ERROR
from ..ops.layouts import swizzle_scales
from . import cuda
from .facts import remembered
from .provider import Implementation, has_row_factors

logger = logging.getLogger("wush_compile")

SCALE_DTYPES = {"mxfp4": torch.float8_e8m0fnu, "nvfp4": torch.float8_e4m3fn}
# With fewer rows a product takes as long as reading the weight, and swizzling the activation's scales costs as much
# again. Kernels that read scales in rows get those calls. The number is a guess: no Blackwell GPU was at hand.
LEAST_ROWS = 64
RECIPES = {"mxfp4": "BlockWise1x32", "nvfp4": "BlockWise1x16"}


def unavailable(capability: tuple[int, int]) -> str | None:
    """Why this provider does not run on a device of this compute capability; None if it does."""
    if not hasattr(F, "scaled_mm"):
        return "this torch has no torch.nn.functional.scaled_mm"
    if capability < (10, 0):
        return f"compute capability {capability[0]}.{capability[1]} has no FP4 tensor cores"
    return None


@functools.cache
def _swizzler(device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function that swizzles scales: one kernel where csrc is built for the device, else a few of PyTorch's."""
    if device.type == "cuda" and cuda.unavailable(torch.cuda.get_device_capability(device)) is None:
        return cuda.load(cuda.TARGETS[torch.cuda.get_device_capability(device)]).swizzle_scales
    return swizzle_scales


def _swizzled(scales: Tensor, format: str) -> Tensor:
    """Scales in rows [M, K/G] -> the flat tensor that cuBLASLt reads."""
    return _swizzler(scales.device)(scales.contiguous()).view(SCALE_DTYPES[format]).flatten()


def swizzled_weight_scales(scales: Tensor, format: str) -> Tensor:
    """Swizzled scales of a weight [N, K/G], remembered."""
    make = functools.partial(_swizzled, format=format)
    return remembered(scales, "swizzled", make, make)


def product(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_global_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """codes [M, K/2] and weight_codes [N, K/2] uint8, scales swizzled and flat -> [M, N] in out_dtype, rounded once."""
    recipes, factors = [getattr(F.ScalingType, RECIPES[format])], ([], [])
    swizzles = [F.SwizzleType.SWIZZLE_32_4_4]
    if global_scale is not None or weight_global_scale is not None:
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        factors = tuple([one if g is None else 1.0 / g.reshape(())] for g in (global_scale, weight_global_scale))
        recipes, swizzles = [*recipes, F.ScalingType.TensorWise], [*swizzles, F.SwizzleType.NO_SWIZZLE]
    return F.scaled_mm(
        codes.view(torch.float4_e2m1fn_x2),
        weight_codes.view(torch.float4_e2m1fn_x2).t(),
        [scales, *factors[0]],
        recipes,
        [weight_scales, *factors[1]],
        recipes,
        swizzles,
        swizzles,
        bias,
        out_dtype,
    )


_found: dict[tuple[str, bool, int], str | None] = {}


def problem(format: str, scaled: bool, device: int) -> str | None:
    """What is wrong with this format's products on a device; None if they are right. The first call tries one."""
    key = format, scaled, device
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            return "no product was tried before this CUDA graph was captured"
        _found[key] = _try(*key)
        if _found[key]:
            logger.info("scaled_mm does not take %s here: %s", format, _found[key])
    return _found[key]


def _place(device: int) -> torch.device:
    return torch.device("cuda", device)


def _try(format: str, scaled: bool, device: int) -> str | None:
    """What is wrong with a small product, compared with float64; None if nothing is."""
    with unset_fake_temporarily():  # a pass may ask while a graph is traced
        return _tried(format, scaled, _place(device))


def _tried(format: str, scaled: bool, place: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x, w = (formats.quantize(torch.randn(rows, 256, generator=generator), format, "absmax") for rows in (48, 64))
    g = torch.full((1,), 0.5, device=place) if scaled else None
    want = formats.dequantize(*x, format).double() @ formats.dequantize(*w, format).double().T * (2 if scaled else 1)
    try:
        swizzled = [_swizzled(s.to(place), format) for s in (x[1], w[1])]
        got = product(x[0].to(place), swizzled[0], g, w[0].to(place), swizzled[1], None, None, format, torch.bfloat16)
        error = ((got.double().cpu() - want).norm() / want.norm()).item()
    except Exception as failure:  # this build of torch or this GPU does not have it
        return f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
    return None if error <= PRODUCT_ERROR[torch.bfloat16] else f"torch's product is wrong by {error:.1g}"


def refuses_fp4_linear(
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
    scale_layout="rows",
    activation_format="same",
) -> str | None:
    if format not in RECIPES:
        return f"{format} is not an FP4 format"
    if activation_format != "same" or scale_layout == "lanes":
        return f"activations in {activation_format} and the layout {scale_layout} are not FP4"
    if has_row_factors(weight_global_scale):
        return "the library takes one global scale of the weight, not a factor of each row"
    n, k = weight_codes.shape[0], 2 * weight_codes.shape[1]
    if n % 16 or k % 32 or n * k == 0:
        return f"the weight is {n} x {k}: they must be multiples of 16 and of 32, and not 0"
    if out_dtype not in (torch.bfloat16, torch.float16) or (bias is not None and bias.dtype != out_dtype):
        return f"output in {out_dtype}, bias in {None if bias is None else bias.dtype}"
    scaled = global_scale is not None or weight_global_scale is not None
    if scaled and format == "mxfp4":
        return "mxfp4 with a global scale"
    rows = codes.numel() // codes.shape[-1]
    if not statically_known_true(rows >= LEAST_ROWS):  # while a graph is compiled, `rows` may be a symbol
        return f"fewer than {LEAST_ROWS} rows, or an unknown number"
    return problem(format, scaled, codes.device.index)


def fp4_linear(
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
    scale_layout="rows",
    activation_format="same",
) -> Tensor:
    """`wush::fp4_linear` (docs/spec.md §6) by cuBLASLt."""
    rows = codes.reshape(-1, codes.shape[-1])
    if scale_layout == "swizzled":
        swizzled = scales.view(SCALE_DTYPES[format]).flatten()
    else:
        swizzled = _swizzled(scales.reshape(-1, scales.shape[-1]), format)
    y = product(
        rows.contiguous(),
        swizzled,
        global_scale,
        weight_codes.contiguous(),
        swizzled_weight_scales(weight_scales, format),
        weight_global_scale,
        bias,
        format,
        out_dtype,
    )
    y = y.view(*codes.shape[:-1], weight_codes.shape[0])
    return y if residual is None else y + residual.to(out_dtype)


IMPLEMENTATIONS = {"fp4_linear": Implementation(fp4_linear, refuses_fp4_linear)}
