"""The CUDA provider: the kernels of csrc/, one library for each GPU architecture, built by `make cuda`.

A wheel or a checkout may hold any of the libraries, or none. A device's library is loaded when its providers are
resolved. Where it is missing or does not run, `unavailable` gives the reason and the remedy in one sentence.
"""

import functools

import torch
from torch import Tensor

from ..formats import FORMATS
from .libraries import libraries, load
from .provider import FLOATS, FixableReason, Implementation, has_row_factors

TARGETS = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a", (12, 1): "sm_121a"}


def unavailable(capability: tuple[int, int]) -> str | None:
    """Why a device of this capability has no CUDA kernels, a `FixableReason` if the user can help; None if it has."""
    target = TARGETS.get(capability)
    if target is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in TARGETS)
        return f"has no kernels for compute capability {capability[0]}.{capability[1]}, only for {known}"
    built = [name for name in libraries() if name != "cpu"]
    remedy = f"`python csrc/build.py --targets {target}` in a checkout builds it (nvcc 12.9 or newer)"
    if not built:
        return f"not built: {remedy}"
    if target not in built:
        return FixableReason(f"built for {', '.join(built)}, not for this GPU's {target}: {remedy}")
    try:
        load(target)
    except (OSError, RuntimeError) as error:
        return FixableReason(f"{libraries()[target].name} does not run here: {str(error).splitlines()[0]}")
    return None


RULES = ("absmax", "mse", "ocp", "paper")  # csrc/quantize.h
# From this many rows on the SiLU variant is the fastest on Hopper too. The other variants never are
# (docs/notebook/cuda_kernels.md).
HOPPER_SILU_ROWS = 1024


# -- ops -------------------------------------------------------------------------------------------------------------


@functools.cache
def _device_target(index: int) -> str:
    return TARGETS[torch.cuda.get_device_capability(index)]


def _target(x: Tensor) -> str:
    return _device_target(x.device.index)


def prefer_others(x, *others) -> bool:
    """True on Hopper, where Triton's quantizers are faster. Nothing is measured on Blackwell: these go first there."""
    return _target(x) == "sm_90a"


def prefer_others_silu_mul(gate, *others) -> bool:
    return _target(gate) == "sm_90a" and gate.numel() < HOPPER_SILU_ROWS * gate.shape[-1]


def _refuses(
    x: Tensor, transform: Tensor | None, format: str, scale_rule: str, scale_layout: str, feedback: Tensor | None
) -> str | None:
    if feedback is not None:
        return "no CUDA kernel rounds with feedback"
    if scale_layout == "lanes":
        return "no CUDA kernel writes the layout lanes"
    if scale_rule not in RULES:
        return f"no CUDA kernel has the scale rule {scale_rule}"
    if format not in ("mxfp4", "nvfp4"):
        return f"{format} has no CUDA kernel"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"input is {x.dtype}"
    if transform is not None and (transform.shape[-1] != FORMATS[format].group_size or transform.dtype != x.dtype):
        return f"transform of {transform.dtype}, blocks of {transform.shape[-1]}"
    return None


def refuses_transform_quantize(
    x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    return _refuses(x, transform, format, scale_rule, scale_layout, feedback)


def transform_quantize(
    x, transform, global_scale, format, scale_rule, scale_layout: str = "rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::transform_quantize` for bf16 and fp16 with transform blocks of the format's group size."""
    ops = load(_target(x))
    transform = None if transform is None else transform.contiguous()
    return ops.transform_quantize(x, transform, global_scale, format, scale_rule, scale_layout == "swizzled")


def refuses_rms_norm(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if weight is not None and weight.dtype != x.dtype:
        return f"gain is {weight.dtype}"
    if eps_tensor is not None and not eps_tensor.is_cuda:
        return "eps is not on the device"
    return _refuses(x, transform, format, scale_rule, scale_layout, feedback)


def rms_norm_transform_quantize(
    x,
    weight,
    eps,
    eps_tensor,
    gain,
    transform,
    global_scale,
    format,
    scale_rule,
    scale_layout: str = "rows",
    feedback=None,
) -> tuple[Tensor, Tensor]:
    """`wush::rms_norm_transform_quantize`; it sums squares in another order than the reference."""
    ops = load(_target(x))
    transform = None if transform is None else transform.contiguous()
    eps_tensor = None if eps_tensor is None else eps_tensor.to(torch.float32)
    return ops.rms_norm_transform_quantize(
        x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout == "swizzled"
    )


def refuses_add_rms_norm(x, residual, weight, eps, eps_tensor, gain, *quantizer) -> str | None:
    if residual.dtype != x.dtype:
        return f"input is {x.dtype}, its residual {residual.dtype}"
    return refuses_rms_norm(x, weight, eps, eps_tensor, gain, *quantizer)


def add_rms_norm_transform_quantize(
    x,
    residual,
    weight,
    eps,
    eps_tensor,
    gain,
    transform,
    global_scale,
    format,
    scale_rule,
    scale_layout: str = "rows",
    feedback=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`wush::add_rms_norm_transform_quantize`; it sums squares in another order than the reference."""
    ops = load(_target(x))
    transform = None if transform is None else transform.contiguous()
    eps_tensor = None if eps_tensor is None else eps_tensor.to(torch.float32)
    tail = (transform, global_scale, format, scale_rule, scale_layout == "swizzled")
    return ops.add_rms_norm_transform_quantize(x, residual, weight, eps, eps_tensor, gain, *tail)


def refuses_silu_mul(
    gate, up, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> str | None:
    if gate.dtype != up.dtype:
        return "gate and up differ in dtype"
    return _refuses(gate, transform, format, scale_rule, scale_layout, feedback)


def silu_mul_transform_quantize(
    gate, up, transform, global_scale, format, scale_rule, scale_layout: str = "rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::silu_mul_transform_quantize`, with the bits of the reference."""
    ops = load(_target(gate))
    transform = None if transform is None else transform.contiguous()
    return ops.silu_mul_transform_quantize(
        gate, up, transform, global_scale, format, scale_rule, scale_layout == "swizzled"
    )


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
    if activation_format != "same" or scale_layout == "lanes":
        return f"{activation_format} activations in the layout {scale_layout} have no CUDA kernel"
    target = _target(codes)
    if target == "sm_90a":
        return "the FP4 instruction is emulated on Hopper, for tests only"
    if format not in ("mxfp4", "nvfp4"):
        return f"{format} has no CUDA kernel"
    if has_row_factors(weight_global_scale):
        return "the CUDA kernels take one global scale of the weight, not a factor of each row"
    if out_dtype not in (FLOATS[:1] if target in ("sm_100a", "sm_103a") else FLOATS):
        return f"output is {out_dtype}"
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
    """`wush::fp4_linear` by Blackwell's block-scaled FP4 instructions, which decide the order of the fp32 sum."""

    def dense(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous()

    return load(_target(codes)).fp4_linear(
        dense(codes),
        dense(scales),
        global_scale,
        dense(weight_codes),
        dense(weight_scales),
        weight_global_scale,
        dense(bias),
        dense(residual),
        format,
        out_dtype,
        scale_layout == "swizzled",
        False,  # the weight's scales are in rows
    )


IMPLEMENTATIONS = {
    "fp4_linear": Implementation(fp4_linear, refuses_fp4_linear),
    "transform_quantize": Implementation(transform_quantize, refuses_transform_quantize, prefer_others),
    "rms_norm_transform_quantize": Implementation(rms_norm_transform_quantize, refuses_rms_norm, prefer_others),
    "add_rms_norm_transform_quantize": Implementation(
        add_rms_norm_transform_quantize, refuses_add_rms_norm, prefer_others
    ),
    "silu_mul_transform_quantize": Implementation(
        silu_mul_transform_quantize, refuses_silu_mul, prefer_others_silu_mul
    ),
}
