"""The CPU provider: the kernels of csrc/cpu, for x86-64 with AVX2, and with AVX-512 and its bf16 dot products.

`csrc/build.py --targets cpu` builds their library; `make` does so where it finds a C++ compiler. The reference computes
every op without it.
"""

import functools
import math

import torch
from torch import Tensor

from ..feedback import shape as feedback_shape
from ..formats import channels, get_format, operand_layout
from ..ops.grouped import by_expert
from ..ops.layouts import in_rows, lay_out, scale_shape
from .libraries import libraries, load
from .provider import FLOATS, FixableReason, Implementation

RULES = ("absmax", "mse", "ocp", "paper", "search")  # in the order of csrc/cpu/kernels.h
FORMATS = {"mxfp4": 32, "nvfp4": 16}  # format of activations -> group size
WEIGHTS = ("mxfp4", "nvfp4", "int8")  # formats of weights, in the order of csrc/cpu/kernels.h
LANES = 16  # a transform's block is a multiple of the widest vector


@functools.cache
def unavailable() -> str | None:
    """Why this CPU has no kernels, a `FixableReason` if the user can help; None if it has."""
    if "cpu" not in libraries():
        return "not built: `python csrc/build.py --targets cpu` in a checkout builds it (a C++ compiler is enough)"
    try:
        load("cpu")
    except (OSError, RuntimeError) as error:
        return FixableReason(f"{libraries()['cpu'].name} does not run here: {str(error).splitlines()[0]}")
    return None


def _number(g: Tensor | None) -> float:
    return 1.0 if g is None else g.item()


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The kernels read what these checks allow, and check nothing themselves."""
    if tensor.device.type != "cpu" or tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected {dtype} {shape} on the CPU"
        )


def refuses_transform_quantize(
    x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if format not in FORMATS:
        return f"{format} has no CPU kernel"
    if scale_layout == "lanes":
        return "the layout lanes is for Hopper's products"
    if x.dtype not in FLOATS:
        return f"input is {x.dtype}"
    if transform is not None and (transform.shape[-1] % LANES or transform.dtype not in FLOATS):
        return f"transform of {transform.dtype}, blocks of {transform.shape[-1]}"
    return None


def transform_quantize(
    x, transform, global_scale, format, scale_rule, scale_layout: str = "rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for MXFP4 and NVFP4; codes and scales have the reference's bits for the same sums."""
    width, group = x.shape[-1], FORMATS[format]
    if scale_rule not in get_format(format).scale_rules or width % group:
        raise ValueError(f"{format} has no scale rule {scale_rule!r}, or {width} is not a multiple of {group}")
    if transform is not None:
        blocks, size = transform.shape[0], transform.shape[-1]
        _check("transform", transform, (blocks, size, size), transform.dtype)
        if width % math.lcm(size, group) or blocks not in (1, width // size):
            raise ValueError(f"{blocks} blocks of {size} do not cover width {width}")
    if feedback is not None:
        if scale_rule == "paper":
            raise ValueError("the scale rule paper rounds to nearest: it takes no feedback")
        _check("feedback", feedback, feedback_shape(format, width), torch.bfloat16)
    rows = x.reshape(-1, width)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    codes = x.new_empty((rows.shape[0], width // 2), dtype=torch.uint8)
    scales = x.new_empty((rows.shape[0], width // group), dtype=torch.uint8)
    load("cpu").transform_quantize(
        rows,
        None if transform is None else transform.contiguous(),
        None if feedback is None else feedback.contiguous(),
        _number(global_scale),
        format == "nvfp4",
        RULES.index(scale_rule),
        codes,
        scales,
    )
    scales = scales.view(scale_shape(x.shape[:-1], width // group, "rows"))
    return codes.view(*x.shape[:-1], width // 2), lay_out(scales, scale_layout)


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
    if format not in WEIGHTS or (format == "int8" and activation_format == "same"):
        return f"{format} has no CPU kernel"
    if out_dtype not in FLOATS:
        return f"output is {out_dtype}"
    if scale_layout == "lanes":
        return "the layout lanes is for Hopper's products"
    if activation_format == "none" and codes.dtype not in FLOATS:
        return f"input is {codes.dtype}"
    for name, other in (("bias", bias), ("residual", residual)):
        if other is not None and other.dtype != out_dtype:
            return f"{name} is {other.dtype}, the output {out_dtype}"
    return None


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
    scale_layout: str = "rows",
    activation_format: str = "same",
) -> Tensor:
    """`wush::fp4_linear`, its operands decoded in registers or a tile at a time; sums in fp32."""
    lead, columns, width = codes.shape[:-1], weight_codes.shape[0], channels(weight_codes, format)
    if activation_format == "same":
        scales = in_rows(scales, lead, 2 * codes.shape[-1] // FORMATS[format], scale_layout)
    operand_columns, dtype, groups, scale_dtype = operand_layout(
        format if activation_format == "same" else activation_format, width, codes.dtype
    )
    _check("the activation", codes, (*lead, operand_columns), dtype)
    _check("its scale", scales, (*lead, groups), scale_dtype)
    fmt = get_format(format)
    _check("the weight", weight_codes, (columns, width // fmt.per_byte), torch.uint8)
    _check("its scale", weight_scales, (columns, width // fmt.group_size), fmt.scale_dtype)
    if bias is not None:
        _check("the bias", bias, (columns,), out_dtype)
    if residual is not None:
        _check("the residual", residual, (*lead, columns), out_dtype)
    # A product of two fp32 numbers is exact here. The kernel rounds it to fp32, as the reference does.
    g, rows = _number(global_scale), None
    if weight_global_scale is not None and weight_global_scale.dtype == torch.bfloat16:
        _check("the global scale of its rows", weight_global_scale, (columns,), torch.bfloat16)
        rows = weight_global_scale.contiguous()
    else:
        g *= _number(weight_global_scale)
    out = codes.new_empty((*lead, columns), dtype=out_dtype)
    load("cpu").fp4_linear(
        codes.contiguous(),
        None if activation_format == "none" else scales.contiguous(),
        weight_codes.contiguous(),
        weight_scales.contiguous(),
        g,
        rows,
        None if bias is None else bias.contiguous(),
        None if residual is None else residual.contiguous(),
        WEIGHTS.index(format),
        activation_format,
        out.view(-1, columns),
    )
    return out


def refuses_fp4_grouped_linear(
    codes,
    scales,
    global_scale,
    weight_codes,
    weight_scales,
    weight_global_scale,
    offs,
    bias,
    format,
    out_dtype,
    scale_layout="rows",
    activation_format="same",
    index=None,
) -> str | None:
    tail = (bias, None, format, out_dtype, scale_layout, activation_format)
    return refuses_fp4_linear(codes, scales, None, weight_codes, weight_scales, None, *tail)


fp4_grouped_linear = by_expert(fp4_linear)

IMPLEMENTATIONS = {
    "fp4_linear": Implementation(fp4_linear, refuses_fp4_linear),
    "fp4_grouped_linear": Implementation(fp4_grouped_linear, refuses_fp4_grouped_linear),
    "transform_quantize": Implementation(transform_quantize, refuses_transform_quantize),
}
