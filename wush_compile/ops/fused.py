"""Fused variants of `wush::transform_quantize`: the norm or activation in front of a quantizer becomes its prologue.

    wush::rms_norm_transform_quantize     RMSNorm(x)            then transform_quantize
    wush::layer_norm_transform_quantize   LayerNorm(x)          then transform_quantize
    wush::add_rms_norm_transform_quantize RMSNorm(x + r)        then transform_quantize, and the sum
    wush::rms_norm_keep_transform_quantize, wush::layer_norm_keep_transform_quantize      the same, and the norm itself
    wush::silu_mul_transform_quantize     SiLU(gate) · up       then transform_quantize
    wush::gelu_mul_transform_quantize     GELU(gate) · up       then transform_quantize
    wush::swiglu_oai_transform_quantize   gpt-oss' clamped gate  then transform_quantize
    wush::activation_transform_quantize   activation(x)         then transform_quantize

Only passes emit these ops. The reference below defines each of them. It rounds to the model dtype exactly where the
replaced graph rounds, so fusing changes no bit. It calls the quantizer as an op, so that a device without a kernel for
the fused variant still uses its kernel for `transform_quantize`.

`gain` says where RMSNorm rounds to the model dtype, with its gain w and x̂ = x · rsqrt(mean(x²) + eps) in fp32:

    "none"           round(x̂)
    "rounded"        w · round(x̂), in the model dtype                      (Llama, Qwen)
    "wide"           round(x̂ · w), the product in fp32                     (torch.nn.RMSNorm in low precision)
    "wide_plus_one"  round(x̂ · (1 + w)), both in fp32                      (Gemma)

`add_rms_norm` adds in fp32 and its norm reads that sum, as vLLM's models do. Rounded to the model dtype, the sum is the
third result, the next residual.

A norm that something else reads too is kept: it is the third result, dense. Apart, the norm moves 4 bytes a value
in bf16 and the quantizer 2.5; together they move 4.5.

`kind` names an activation without a gate, by `ACTIVATIONS`. transformers spells `gelu_new` and `quick_gelu` out in
single ops, so each step rounds to the model dtype.

`swiglu_oai` takes gate and up as one tensor in whose columns they alternate, as gpt-oss' product leaves them. Each step
rounds to the model dtype.

`eps` is a number. With `dynamic=True` Dynamo turns Python floats into graph inputs: then `eps_tensor` is a scalar
tensor, and `eps` is ignored.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .core import FAKE
from .schema import define

GAINS = ("none", "rounded", "wide", "wide_plus_one")


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | Tensor, gain: str, dtype: torch.dtype | None = None
) -> Tensor:
    """x [.., K], weight [K] -> [.., K] in `dtype` (None: x's), rounded as `gain` says."""
    wide, dtype = x.to(torch.float32), dtype or x.dtype
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if gain == "none":
        return normed.to(dtype)
    if gain == "rounded":
        return weight * normed.to(dtype)
    if gain == "wide":
        return (normed * weight.to(torch.float32)).to(dtype)
    if gain == "wide_plus_one":
        return (normed * (1.0 + weight.to(torch.float32))).to(dtype)
    raise ValueError(f"gain {gain!r} is not one of {', '.join(GAINS)}")


def _rms_norm_transform_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    gain: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    eps = eps if eps_tensor is None else eps_tensor.to(torch.float32)
    normed = rms_norm(x, weight, eps, gain)
    return torch.ops.wush.transform_quantize(
        normed, transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def _add_rms_norm_transform_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    gain: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    eps = eps if eps_tensor is None else eps_tensor.to(torch.float32)
    total = (x.to(torch.float32) + residual.to(torch.float32)).contiguous()  # [.., K]
    normed = rms_norm(total, weight, eps, gain, x.dtype)
    quantized = torch.ops.wush.transform_quantize(
        normed, transform, global_scale, format, scale_rule, scale_layout, feedback
    )
    return *quantized, total.to(x.dtype)


def _layer_norm_transform_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    eps = eps if eps_tensor is None else float(eps_tensor)
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.ops.wush.transform_quantize(
        normed, transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def _rms_norm_keep_transform_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    gain: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    eps = eps if eps_tensor is None else eps_tensor.to(torch.float32)
    normed = rms_norm(x, weight, eps, gain).contiguous()
    return *torch.ops.wush.transform_quantize(
        normed, transform, global_scale, format, scale_rule, scale_layout, feedback
    ), normed


def _layer_norm_keep_transform_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    eps_tensor: Tensor | None,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    eps = eps if eps_tensor is None else float(eps_tensor)
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()
    return *torch.ops.wush.transform_quantize(
        normed, transform, global_scale, format, scale_rule, scale_layout, feedback
    ), normed


def _silu_mul_transform_quantize(
    gate: Tensor,
    up: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.wush.transform_quantize(
        F.silu(gate) * up, transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def _gelu_mul_transform_quantize(
    gate: Tensor,
    up: Tensor,
    approximate: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    activated = F.gelu(gate, approximate=approximate) * up
    return torch.ops.wush.transform_quantize(
        activated, transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def swiglu_oai(x: Tensor, limit: float) -> Tensor:
    """gpt-oss' gate: x [.., 2K], gate and up in alternating columns -> (up + 1) · gate · sigmoid(1.702 gate) [.., K],
    of gate up to `limit`, and of up between −limit and limit."""
    gate, up = x.unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _swiglu_oai_transform_quantize(
    x: Tensor,
    limit: float,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return torch.ops.wush.transform_quantize(
        swiglu_oai(x, limit), transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu_new": _gelu_new,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def _activation_transform_quantize(
    x: Tensor,
    kind: str,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}")
    activated = ACTIVATIONS[kind](x)
    return torch.ops.wush.transform_quantize(
        activated, transform, global_scale, format, scale_rule, scale_layout, feedback
    )


def _norm_fake(x, vectors, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    for vector in vectors:
        if vector is not None:
            torch._check(vector.device == x.device, lambda: f"x is on {x.device}, its norm is on {vector.device}")
            torch._check(vector.shape[-1] == x.shape[-1], lambda: "the norm does not have the width of x")
    return FAKE["transform_quantize"](x, transform, global_scale, format, scale_rule, scale_layout, feedback)


def _rms_norm_fake(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
):
    torch._check(gain in GAINS, lambda: f"gain {gain!r} is not one of {', '.join(GAINS)}")
    torch._check((weight is None) == (gain == "none"), lambda: f"gain {gain!r} does not fit the weight")
    return _norm_fake(x, (weight,), transform, global_scale, format, scale_rule, scale_layout, feedback)


def _add_rms_norm_fake(x, residual, weight, eps, eps_tensor, gain, *quantizer):
    torch._check(residual.device == x.device, lambda: f"x is on {x.device}, its residual on {residual.device}")
    torch._check(residual.dtype == x.dtype, lambda: f"x is {x.dtype}, its residual {residual.dtype}")
    torch._check(residual.dim() == x.dim(), lambda: "x and its residual differ in rank")
    for a, b in zip(x.shape, residual.shape):
        torch._check(a == b, lambda: "x and its residual differ in shape")
    return *_rms_norm_fake(x, weight, eps, eps_tensor, gain, *quantizer), x.new_empty(x.shape)


def _layer_norm_fake(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
):
    return _norm_fake(x, (weight, bias), transform, global_scale, format, scale_rule, scale_layout, feedback)


def _rms_norm_keep_fake(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
):
    quantizer = (transform, global_scale, format, scale_rule, scale_layout, feedback)
    return *_rms_norm_fake(x, weight, eps, eps_tensor, gain, *quantizer), x.new_empty(x.shape)


def _layer_norm_keep_fake(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
):
    quantizer = (transform, global_scale, format, scale_rule, scale_layout, feedback)
    return *_norm_fake(x, (weight, bias), *quantizer), x.new_empty(x.shape)


def _mul_fake(gate, up, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    torch._check(gate.device == up.device, lambda: f"gate is on {gate.device}, up on {up.device}")
    torch._check(gate.dim() == up.dim(), lambda: "gate and up differ in rank")
    for a, b in zip(gate.shape, up.shape):
        torch._check(a == b, lambda: "gate and up differ in shape")
    return FAKE["transform_quantize"](gate, transform, global_scale, format, scale_rule, scale_layout, feedback)


def _gelu_mul_fake(
    gate, up, approximate, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
):
    return _mul_fake(gate, up, transform, global_scale, format, scale_rule, scale_layout, feedback)


def _swiglu_oai_fake(x, limit, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    torch._check(x.shape[-1] % 2 == 0, lambda: f"gate and up alternate in {x.shape[-1]} columns, an odd number")
    torch._check(limit > 0, lambda: f"a limit of {limit} leaves no gate")
    gate = x.unflatten(-1, (-1, 2)).select(-1, 0)
    return FAKE["transform_quantize"](gate, transform, global_scale, format, scale_rule, scale_layout, feedback)


def _activation_fake(x, kind, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    torch._check(kind in ACTIVATIONS, lambda: f"activation {kind!r} is not one of {', '.join(ACTIVATIONS)}")
    return FAKE["transform_quantize"](x, transform, global_scale, format, scale_rule, scale_layout, feedback)


FUSED_REFERENCE = {
    "rms_norm_transform_quantize": _rms_norm_transform_quantize,
    "add_rms_norm_transform_quantize": _add_rms_norm_transform_quantize,
    "layer_norm_transform_quantize": _layer_norm_transform_quantize,
    "rms_norm_keep_transform_quantize": _rms_norm_keep_transform_quantize,
    "layer_norm_keep_transform_quantize": _layer_norm_keep_transform_quantize,
    "silu_mul_transform_quantize": _silu_mul_transform_quantize,
    "gelu_mul_transform_quantize": _gelu_mul_transform_quantize,
    "swiglu_oai_transform_quantize": _swiglu_oai_transform_quantize,
    "activation_transform_quantize": _activation_transform_quantize,
}
FUSED_FAKE = {
    "rms_norm_transform_quantize": _rms_norm_fake,
    "add_rms_norm_transform_quantize": _add_rms_norm_fake,
    "layer_norm_transform_quantize": _layer_norm_fake,
    "rms_norm_keep_transform_quantize": _rms_norm_keep_fake,
    "layer_norm_keep_transform_quantize": _layer_norm_keep_fake,
    "silu_mul_transform_quantize": _mul_fake,
    "gelu_mul_transform_quantize": _gelu_mul_fake,
    "swiglu_oai_transform_quantize": _swiglu_oai_fake,
    "activation_transform_quantize": _activation_fake,
}
for name, reference in FUSED_REFERENCE.items():
    define(name, reference, FUSED_FAKE[name])
