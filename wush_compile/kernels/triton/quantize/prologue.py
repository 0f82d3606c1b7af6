"""Prologues: norms and activations in front of the quantizer, in the same kernel.

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
QUICK_GELU = tl.constexpr(1.702)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), fp32, with the exponential and the division of torch.nn.functional.silu on a GPU."""
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


# x / (1 + exp(-x)) as (x / 4) / (1/4 + exp(-x) / 4): the quarter keeps the reciprocal of the largest finite sum normal.
_SILU_PTX = tl.constexpr(
    "{ .reg .f32 d, q; fma.rn.f32 d, $1, 0fBFB8AA3B, 0fC0000000; ex2.approx.ftz.f32 d, d; add.rn.f32 d, d, 0f3E800000; "
    "rcp.approx.ftz.f32 d, d; mul.rn.f32 q, $1, 0f3E800000; mul.rn.f32 $0, q, d; }"
)


@triton.jit
def silu_of_bf16(x):
    """`silu` of values that bf16 has, fp32, whose rounding to bf16 is that of `silu` for each of the 65536. By the
    hardware's approximate exponential and reciprocal: 6 instructions instead of 25. All values were compared on an
    H200, none on GPUs before sm_86 and after sm_90, which take `silu`."""
    return tl.inline_asm_elementwise(_SILU_PTX, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """torch.nn.functional.gelu in fp32: the same operations in the same order."""
    if TANH:
        inner = GELU_BETA * tl.fma(x * x * x, GELU_KAPPA, x)
        return 0.5 * x * (1.0 + libdevice.tanh(inner))
    return x * 0.5 * (1.0 + libdevice.erf(x * SQRT1_2))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x fp32, as one operation of a graph in DTYPE leaves it."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def gelu_new(x, DTYPE: tl.constexpr):
    """The tanh approximation of GELU in single ops of DTYPE, as transformers spells it out; x fp32. The cube rounds
    twice, as that of torch.pow on a GPU does."""
    cube = rounded(rounded(x * x, DTYPE) * x, DTYPE)
    inner = rounded(x + rounded(cube * GELU_KAPPA, DTYPE), DTYPE)
    tanh = rounded(libdevice.tanh(rounded(inner * GELU_BETA, DTYPE)), DTYPE)
    return rounded(0.5 * x, DTYPE) * rounded(1.0 + tanh, DTYPE)


@triton.jit
def quick_gelu(x, DTYPE: tl.constexpr):
    """x * sigmoid(1.702 * x) in single ops of DTYPE; x fp32."""
    return x * rounded(tl.div_rn(1.0, 1.0 + libdevice.exp(-rounded(x * QUICK_GELU, DTYPE))), DTYPE)


@triton.jit
def activated(x, KIND: tl.constexpr, SM: tl.constexpr = 0):
    """An activation of a tile of a 16-bit dtype, by its name in `ops.fused.ACTIVATIONS`, rounded. SM: as `Spec.sm`."""
    wide = x.to(tl.float32)
    if KIND == "silu":
        if SM >= 86 and SM < 100 and x.dtype == tl.bfloat16:
            y = silu_of_bf16(wide)
        else:
            y = silu(wide)
    elif KIND == "gelu_new":
        y = gelu_new(wide, x.dtype)
    elif KIND == "quick_gelu":
        y = quick_gelu(wide, x.dtype)
    elif KIND == "relu":
        y = tl.where(wide <= 0.0, 0.0, wide)  # NaN stays
    elif KIND == "relu2":
        y = tl.where(wide <= 0.0, 0.0, wide * wide)
    else:
        y = gelu(wide, KIND == "gelu_tanh")
    return y.to(x.dtype)


@triton.jit
def gated(gate, up, KIND: tl.constexpr, SM: tl.constexpr):
    """activation(gate) rounded, times up, rounded: tiles of one 16-bit dtype."""
    return (activated(gate, KIND, SM).to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def swiglu_oai(x, LIMIT: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """gpt-oss' clamped gate, `ops.fused.swiglu_oai`: a tile [R, 2W] of a 16-bit dtype -> [R, W]. NaN stays."""
    DTYPE: tl.constexpr = x.dtype
    most = rounded(tl.full((R, W), LIMIT, tl.float32), DTYPE)
    gate, up = tl.split(tl.reshape(x, (R, W, 2)))
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    gate = tl.where(gate > most, most, gate)
    up = tl.where(up > most, most, tl.where(up < -most, -most, up))
    return (rounded(up + 1.0, DTYPE) * rounded(quick_gelu(gate, DTYPE), DTYPE)).to(DTYPE)


@triton.jit
def normed(wide, mean, scale, weight, bias, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """A norm of a tile fp32 [R, W], rounded to DTYPE: mean and scale (1/deviation) fp32 [R, 1]; weight and bias [1, W]
    or None.

    KIND: "rms_" and a gain of `ops.fused.GAINS`, or "layer_norm"."""
    if KIND == "layer_norm":
        y = (wide - mean) * scale
        if weight is not None:
            y = y * weight.to(tl.float32)
        if bias is not None:
            y = y + bias.to(tl.float32)
        return y.to(DTYPE)
    y = wide * scale
    if KIND == "rms_rounded":
        y = y.to(DTYPE).to(tl.float32) * weight.to(tl.float32)
    elif KIND == "rms_wide":
        y = y * weight.to(tl.float32)
    elif KIND == "rms_wide_plus_one":
        y = y * (1.0 + weight.to(tl.float32))
    return y.to(DTYPE)


class Prologue(NamedTuple):
    """The operation on x before the quantizer: its name, a KIND of `activated` or `normed`, and its other operands.

    An activation with `up` is a gated one. `swiglu_oai` has a limit. A norm with `up` is that of x + up in fp32."""

    name: str | None = None
    up: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    scale: Tensor | None = None
    limit: float = 0.0
    kept: Tensor | None = None  # where the result of a norm, or the sum that it is of, is written, dense
