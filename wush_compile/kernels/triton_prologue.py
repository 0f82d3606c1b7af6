"""What may stand in front of the quantizer, in its kernel: norms and gated activations, rounded where the graph rounds.

Each is a function of one tile, fp32 inside, with one rounding to the model dtype for every operation of the graph it
replaces (`fused_ops.py` has the definitions). Norms take their rows' statistics from a kernel that runs before.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .triton_launch import start_next, wait_inputs

SQRT1_2 = tl.constexpr(0.7071067811865476)
# The tanh approximation of GELU: tanh(BETA * (x + KAPPA * x^3)).
GELU_BETA = tl.constexpr(0.7978845608028654)
GELU_KAPPA = tl.constexpr(0.044715)


@triton.jit
def silu(x):
    """x / (1 + exp(-x)), fp32, with the exponential and the division that torch.nn.functional.silu has on a GPU."""
    return tl.div_rn(x, 1.0 + libdevice.exp(-x))


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """torch.nn.functional.gelu in fp32, its operations in its order."""
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

    KIND: "rms_" and a gain of `fused_ops.GAINS`, or "layer_norm"."""
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


@triton.jit(do_not_specialize=["M"])
def row_statistics_kernel(
    x, eps, mean, scale, M, stride, K: tl.constexpr, CENTERED: tl.constexpr, EPS_TENSOR: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, PDL: tl.constexpr,
):
    """x [M, K] -> scale fp32 [M] = rsqrt(mean(x^2) + eps), or with CENTERED the mean and rsqrt(variance + eps); grid
    (rows/R). eps: a number, or with EPS_TENSOR a pointer to one."""
    start_next(PDL)
    wait_inputs(PDL)
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    inside = (rows < M)[:, None]
    pointers = x + rows[:, None] * stride
    shift = tl.zeros((R, 1), tl.float32)
    if CENTERED:
        total = tl.zeros((R, C), tl.float32)
        for k in tl.range(0, K, C):
            columns = k + tl.arange(0, C)[None, :]
            total += tl.load(pointers + columns, mask=inside & (columns < K), other=0.0).to(tl.float32)
        shift = tl.sum(total, axis=1)[:, None] * (1.0 / K)
        tl.store(mean + rows[:, None], shift, mask=inside)
    total = tl.zeros((R, C), tl.float32)
    for k in tl.range(0, K, C):
        columns = k + tl.arange(0, C)[None, :]
        there = inside & (columns < K)
        value = tl.load(pointers + columns, mask=there, other=0.0).to(tl.float32)
        value = tl.where(there, value - shift, 0.0)
        total += value * value
    if EPS_TENSOR:
        eps = tl.load(eps).to(tl.float32)
    square = tl.sum(total, axis=1)[:, None] * (1.0 / K)
    tl.store(scale + rows[:, None], libdevice.rsqrt(square + eps), mask=inside)
