"""The fused ops (`ops/fused.py`) in Triton: the quantizer with a prologue."""

from torch import Tensor

from ....formats import ACTIVATION_FORMATS
from ....ops.layouts import rows_only
from .norm import norm_quantize
from .prologue import Prologue
from .tokens import quantize_tokens
from .transform_quantize import transform_quantize


def rms_norm_transform_quantize(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::rms_norm_transform_quantize`. The sum of squares has another order than PyTorch's."""
    rows_only(scale_layout)
    eps = eps if eps_tensor is None else eps_tensor
    tail = (transform, global_scale, format, scale_rule)
    return norm_quantize(x, weight, None, eps, f"rms_{gain}", *tail, feedback=feedback)


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
    scale_layout="rows",
    feedback=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`wush::add_rms_norm_transform_quantize`. The sum of squares has another order than PyTorch's."""
    rows_only(scale_layout)
    eps = eps if eps_tensor is None else eps_tensor
    total = x.new_empty(x.shape)
    tail = (transform, global_scale, format, scale_rule)
    more = dict(kept=total, up=residual, feedback=feedback)
    return *norm_quantize(x, weight, None, eps, f"rms_{gain}", *tail, **more), total


def layer_norm_transform_quantize(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::layer_norm_transform_quantize`. The sums have another order than PyTorch's."""
    rows_only(scale_layout)
    eps = eps if eps_tensor is None else eps_tensor
    tail = (transform, global_scale, format, scale_rule)
    return norm_quantize(x, weight, bias, eps, "layer_norm", *tail, feedback=feedback)


def _gated(prologue, gate, transform, global_scale, format, scale_rule, scale_layout, feedback):
    if format in ACTIVATION_FORMATS or scale_layout == "lanes":
        lanes = scale_layout == "lanes"
        rule = dict(global_scale=global_scale, rule=scale_rule, lanes=lanes, feedback=feedback)
        return quantize_tokens(gate, transform, format, prologue, **rule)
    tail = dict(swizzled=scale_layout == "swizzled", prologue=prologue, feedback=feedback)
    return transform_quantize(gate, transform, global_scale, format, scale_rule, **tail)


def rms_norm_keep_transform_quantize(
    x, weight, eps, eps_tensor, gain, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor, Tensor]:
    """`wush::rms_norm_keep_transform_quantize`."""
    rows_only(scale_layout)
    eps = eps if eps_tensor is None else eps_tensor
    kept = x.new_empty(x.shape)
    tail = (transform, global_scale, format, scale_rule)
    return *norm_quantize(x, weight, None, eps, f"rms_{gain}", *tail, kept=kept, feedback=feedback), kept


def layer_norm_keep_transform_quantize(
    x, weight, bias, eps, eps_tensor, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor, Tensor]:
    """`wush::layer_norm_keep_transform_quantize`."""
    rows_only(scale_layout)
    eps = eps if eps_tensor is None else eps_tensor
    kept = x.new_empty(x.shape)
    tail = (transform, global_scale, format, scale_rule)
    return *norm_quantize(x, weight, bias, eps, "layer_norm", *tail, kept=kept, feedback=feedback), kept


def silu_mul_transform_quantize(
    gate, up, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::silu_mul_transform_quantize`."""
    return _gated(Prologue("silu", up), gate, transform, global_scale, format, scale_rule, scale_layout, feedback)


def gelu_mul_transform_quantize(
    gate, up, approximate, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::gelu_mul_transform_quantize`; approximate: none or tanh."""
    prologue = Prologue("gelu" if approximate == "none" else "gelu_tanh", up)
    return _gated(prologue, gate, transform, global_scale, format, scale_rule, scale_layout, feedback)


def swiglu_oai_transform_quantize(
    x, limit, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::swiglu_oai_transform_quantize`."""
    prologue = Prologue("swiglu_oai", limit=limit)
    return _gated(prologue, x, transform, global_scale, format, scale_rule, scale_layout, feedback)


def activation_transform_quantize(
    x, kind, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None
) -> tuple[Tensor, Tensor]:
    """`wush::activation_transform_quantize`; kind: a name in `ops.fused.ACTIVATIONS`."""
    return _gated(Prologue(kind), x, transform, global_scale, format, scale_rule, scale_layout, feedback)
