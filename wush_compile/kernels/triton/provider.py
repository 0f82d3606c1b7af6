"""The ops of the Triton provider, and the calls that it refuses, from the arguments alone."""

import functools
from collections.abc import Callable

import torch

from ...formats import ACTIVATION_FORMATS, FORMATS, channels
from ...ops.fused import ACTIVATIONS, GAINS
from ...ops.layouts import layouts_of, rows_only
from ..provider import Implementation
from .calibration import moments as triton_gram
from .grouped import fp4_grouped_linear as triton_grouped
from .linear import fp4_linear as triton_linear
from .quantize import fused as triton_fused
from .quantize import tokens as triton_tokens
from .quantize import transform_quantize as triton_quantize

NORM_LAYOUT = "the norms' kernels write scales in rows only"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def refuses_transform_quantize(
    x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    fmt = ACTIVATION_FORMATS.get(format) or FORMATS.get(format)
    if fmt is None or format == "int4":
        return f"{format} has no Triton kernel"
    if scale_layout not in layouts_of(format, x.shape[-1]):
        return f"{format} of width {x.shape[-1]} is not in the layout {scale_layout}"
    if x.dtype not in FLOATS:
        return f"input is {x.dtype}"
    width = x.shape[-1]
    if width % fmt.group_size or scale_rule not in fmt.scale_rules:
        return f"width {width}, rule {scale_rule}"
    if global_scale is not None and (
        global_scale.dtype != torch.float32 or global_scale.numel() != 1 or global_scale.device != x.device
    ):
        return f"global scale is {global_scale.dtype} {tuple(global_scale.shape)} on {global_scale.device}"
    if feedback is not None and (feedback.device != x.device or transform is None):
        return "feedback needs a transform, and all of it on one device"
    if transform is not None:
        block = transform.shape[-1]
        if transform.dtype not in FLOATS or transform.device != x.device:
            return f"transform is {transform.dtype} on {transform.device}"
        if block & (block - 1) or block > 256 or block < 16:
            return f"transform blocks of {block}"
        if (
            transform.dim() != 3
            or transform.shape[1] != block
            or width % block
            or (transform.shape[0] != 1 and transform.shape[0] * block != width)
        ):
            return f"transform {tuple(transform.shape)} for width {width}"
        if block > 64 and torch.float32 in (x.dtype, transform.dtype):
            return "fp32 transforms of wide blocks"
    return None


def _refuses_prologue(x, transform, global_scale, format, scale_rule, feedback, others) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"input is {x.dtype}"
    for other in others:
        if other is not None and (other.dtype != x.dtype or other.device != x.device):
            return f"input is {x.dtype} on {x.device}, an operand {other.dtype} on {other.device}"
    return refuses_transform_quantize(x, transform, global_scale, format, scale_rule, feedback=feedback)


def _refuses_norm(x, vectors, eps_tensor, transform, global_scale, format, scale_rule, feedback) -> str | None:
    if format in ACTIVATION_FORMATS:
        return f"no kernel has a norm in front of {format} activations"
    if any(v is not None and v.shape != x.shape[-1:] for v in vectors):
        return "the norm does not have the width of the input"
    if eps_tensor is not None and (eps_tensor.device != x.device or eps_tensor.numel() != 1):
        return "eps is not one number on the device"
    return _refuses_prologue(x, transform, global_scale, format, scale_rule, feedback, vectors)


def refuses_rms_norm(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if scale_layout != "rows":
        return NORM_LAYOUT
    if gain not in GAINS or (weight is None) != (gain == "none"):
        return f"gain {gain} does not fit the presence of a weight"
    return _refuses_norm(x, (weight,), eps_tensor, transform, global_scale, format, scale_rule, feedback)


def refuses_add_rms_norm(x, residual, weight, eps, eps_tensor, gain, *quantizer) -> str | None:
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        return "x and its residual differ"
    return refuses_rms_norm(x, weight, eps, eps_tensor, gain, *quantizer)


def refuses_layer_norm(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if scale_layout != "rows":
        return NORM_LAYOUT
    return _refuses_norm(x, (weight, bias), eps_tensor, transform, global_scale, format, scale_rule, feedback)


def refuses_silu_mul(
    gate, up, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if gate.shape != up.shape:
        return "gate and up differ in shape"
    return _refuses_prologue(gate, transform, global_scale, format, scale_rule, feedback, (up,))


def refuses_gelu_mul(
    gate, up, approximate, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if approximate not in ("none", "tanh"):
        return f"approximation {approximate}"
    return refuses_silu_mul(gate, up, transform, global_scale, format, scale_rule, feedback=feedback)


def refuses_swiglu_oai(
    x, limit, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if x.shape[-1] % 2:
        return "gate and up do not alternate in an odd number of columns"
    gate = x.unflatten(-1, (-1, 2)).select(-1, 0)
    return _refuses_prologue(gate, transform, global_scale, format, scale_rule, feedback, ())


def refuses_activation(
    x, kind, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if kind not in ACTIVATIONS:
        return f"activation {kind}"
    return _refuses_prologue(x, transform, global_scale, format, scale_rule, feedback, ())


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
    if activation_format not in ("same", "fp8", "none"):
        return f"{activation_format} activations have no Triton kernel"
    if scale_layout == "lanes":
        reason = triton_linear.refuses_lanes(format, activation_format, codes, channels(weight_codes, format))
        if reason is not None:
            return reason
    elif scale_layout != "rows":
        return f"products read scales in rows, not {scale_layout}"
    if activation_format == "none" and codes.dtype not in (torch.bfloat16, torch.float16):
        return f"activations of {codes.dtype} have no exact product on tensor cores"
    return triton_linear.supports(format, channels(weight_codes, format))


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
    if scale_layout != "rows":
        return f"products read scales in rows, not {scale_layout}"
    return triton_grouped.supports(format, 2 * weight_codes.shape[-1], codes.dtype, activation_format)


def refuses_observe(x, mask, moment, count, sample, seed=0, weight=None) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16) or moment.dtype != torch.float32:
        return f"rows are {x.dtype}, the moment {moment.dtype}"
    return None


def transform_quantize(x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    """`wush::transform_quantize` in Triton."""
    if format in ACTIVATION_FORMATS or scale_layout == "lanes":
        lanes = scale_layout == "lanes"
        rule = dict(global_scale=global_scale, rule=scale_rule, lanes=lanes, feedback=feedback)
        return triton_tokens.quantize_tokens(x, transform, format, **rule)
    more = dict(swizzled=scale_layout == "swizzled", feedback=feedback)
    return triton_quantize.transform_quantize(x, transform, global_scale, format, scale_rule, **more)


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
):
    """`wush::fp4_linear` in Triton; `refuses_fp4_linear` says for which layouts."""
    return triton_linear.fp4_linear(
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
        activation_format=activation_format,
        lanes=scale_layout == "lanes",
    )


def fp4_grouped_linear(
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
):
    """`wush::fp4_grouped_linear` in Triton, for scales in rows."""
    rows_only(scale_layout)
    return triton_grouped.fp4_grouped_linear(
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
        activation_format,
        index,
    )


def _there(run: Callable) -> Callable:
    """Makes the first argument's device current while `run` runs: Triton launches kernels on the current device."""

    @functools.wraps(run, updated=())
    def guarded(first, *args, **options):
        if first.device.index == torch.cuda.current_device():
            return run(first, *args, **options)
        with torch.cuda.device(first.device):
            return run(first, *args, **options)

    return guarded


IMPLEMENTATIONS = {
    "observe": Implementation(_there(triton_gram.observe), refuses_observe),
    "transform_quantize": Implementation(_there(transform_quantize), refuses_transform_quantize),
    "rms_norm_transform_quantize": Implementation(_there(triton_fused.rms_norm_transform_quantize), refuses_rms_norm),
    "add_rms_norm_transform_quantize": Implementation(
        _there(triton_fused.add_rms_norm_transform_quantize), refuses_add_rms_norm
    ),
    "layer_norm_transform_quantize": Implementation(
        _there(triton_fused.layer_norm_transform_quantize), refuses_layer_norm
    ),
    "rms_norm_keep_transform_quantize": Implementation(
        _there(triton_fused.rms_norm_keep_transform_quantize), refuses_rms_norm
    ),
    "layer_norm_keep_transform_quantize": Implementation(
        _there(triton_fused.layer_norm_keep_transform_quantize), refuses_layer_norm
    ),
    "silu_mul_transform_quantize": Implementation(_there(triton_fused.silu_mul_transform_quantize), refuses_silu_mul),
    "gelu_mul_transform_quantize": Implementation(_there(triton_fused.gelu_mul_transform_quantize), refuses_gelu_mul),
    "swiglu_oai_transform_quantize": Implementation(
        _there(triton_fused.swiglu_oai_transform_quantize), refuses_swiglu_oai
    ),
    "activation_transform_quantize": Implementation(
        _there(triton_fused.activation_transform_quantize), refuses_activation
    ),
    "fp4_linear": Implementation(_there(fp4_linear), refuses_fp4_linear),
    "fp4_grouped_linear": Implementation(_there(fp4_grouped_linear), refuses_fp4_grouped_linear),
}
