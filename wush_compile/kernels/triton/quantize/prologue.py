"""Prologues: norms and gated activations in front of the quantizer, in the same kernel.

A prologue is a function of one tile. It computes in fp32, and rounds to the model dtype once for every operation of the
graph that it replaces (`ops/fused.py` has the definitions). `norm.py` says where the statistics of a norm's rows come
from.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

SQRT1_2 = tl.constexpr(0.7071067811865476)
# The tanh approximation of GELU: tanh(BETA * (x + KAPPA * x^3)).
GELU_BETA = tl.constexpr(0.7978845608028654)
GELU_KAPPA = tl.constexpr(0.044715)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), fp32, with the exponential and the division of torch.nn.functional.silu on a GPU."""
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """torch.nn.functional.gelu in fp32: the same operations in the same order."""
    if TANH:
        inner = GELU_BETA * tl.fma(x * x * x, GELU_KAPPA, x)
        return 0.5 * x * (1.0 + libdevice.tanh(inner))
    return x * 0.5 * (1.0 + libdevice.erf(x * SQRT1_2))


@triton.jit
def gated(gate, up, KIND: tl.constexpr):
    """act(gate) rounded, times up, rounded: tiles of one 16-bit dtype."""
    wide = gate.to(tl.float32)
    if KIND == "silu_mul":
        activated = silu(wide)
    else:
        activated = gelu(wide, KIND == "gelu_tanh_mul")
    activated = activated.to(gate.dtype).to(tl.float32)
    return (activated * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def normed(x, mean, scale, weight, bias, KIND: tl.constexpr):
    """A norm of a tile [R, W]: mean and scale (1/deviation) fp32 [R, 1]; weight and bias [1, W] or None.

    KIND: "rms_" and a gain of `ops.fused.GAINS`, or "layer_norm"."""
    wide = x.to(tl.float32)
    if KIND == "layer_norm":
        y = (wide - mean) * scale
        if weight is not None:
            y = y * weight.to(tl.float32)
        if bias is not None:
            y = y + bias.to(tl.float32)
        return y.to(x.dtype)
    y = wide * scale
    if KIND == "rms_rounded":
        y = y.to(x.dtype).to(tl.float32) * weight.to(tl.float32)
    elif KIND == "rms_wide":
        y = y * weight.to(tl.float32)
    elif KIND == "rms_wide_plus_one":
        y = y * (1.0 + weight.to(tl.float32))
    return y.to(x.dtype)


class Prologue(NamedTuple):
    """The operation on x before the quantizer: its name, a KIND of `gated` or `normed`, and its other operands."""

    name: str | None = None
    up: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None
