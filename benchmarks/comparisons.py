"""The same linear layers by other libraries, torchao and FP-Quant, for `kernel_speed.py compare`. A library that cannot
be imported has no column. No other file imports this one.

    torchao float8          W8A8, a scale a row and a token, cuBLASLt: the usual choice on Hopper today
    torchao int4            weights only, groups of 128, bf16 activations (tinygemm, which is part of PyTorch)
    torchao NVFP4 weights   weights only; decoded to bf16 in every call, then cuBLAS
    torchao MXFP4 emulated  both operands quantized, both decoded to bf16, then cuBLAS: torchao's emulation of W4A4
    FP-Quant MXFP4          its pseudoquantization (Hadamard of 32, a Triton kernel), weights kept in bf16, cuBLAS

A module that is meant to be compiled is compiled by Inductor. The number of rows is then dynamic, except for one row.
"eager" columns are not compiled.

torchao 0.18 and fp-quant 0.3.2 are meant for torch 2.11. torchao's other int4 packings and its fastest float8 kernels
need `mslk`. torchao's dynamic NVFP4 and FP-Quant's real kernels (QuTLASS) need a Blackwell GPU.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wush_compile.diagnostics.timing import copies, time_us


def float8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(linear, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return linear


def int4(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    quantize_(
        linear, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)
    )
    return linear


def nvfp4_weights(linear: nn.Linear) -> nn.Module:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(linear, NVFP4WeightOnlyConfig())
    return linear


def mxfp4_emulated(linear: nn.Linear) -> nn.Module:
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

    quantize_(
        linear,
        MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float4_e2m1fn_x2,
            weight_dtype=torch.float4_e2m1fn_x2,
            kernel_preference=KernelPreference.EMULATED,
        ),
    )
    return linear


def fp_quant(linear: nn.Linear) -> nn.Module:
    from fp_quant import FPQuantConfig, FPQuantDtype, FPQuantLinear

    config = FPQuantConfig(
        forward_dtype=FPQuantDtype.MXFP4,
        forward_method="abs_max",
        backward_dtype=FPQuantDtype.BF16,
        pseudoquantization=True,
    )
    module = FPQuantLinear(
        linear.in_features,
        linear.out_features,
        config,
        bias=False,
        device=linear.weight.device,
        dtype=linear.weight.dtype,
    )
    module.weight.copy_(linear.weight)
    module.pre_forward()
    return module


class Comparison(NamedTuple):
    """How a bf16 linear is quantized, how many bytes a weight takes then, whether it is meant for `torch.compile`, and
    whether it has kernels of its own to compile."""

    make: Callable[[nn.Linear], nn.Module]
    nbytes: float
    compiled: bool = False
    kernels: bool = False


COMPARISONS = {
    "torchao float8": Comparison(float8, 1, compiled=True),
    "torchao int4": Comparison(int4, 0.53),
    "FP-Quant MXFP4": Comparison(fp_quant, 2, kernels=True),
    "torchao MXFP4 emulated, eager": Comparison(mxfp4_emulated, 0.53),
    "torchao NVFP4 weights": Comparison(nvfp4_weights, 0.56, compiled=True),
    "torchao float8, eager": Comparison(float8, 1),
    "torchao NVFP4 weights, eager": Comparison(nvfp4_weights, 0.56),
}
SECONDS = 45  # for all libraries; one that is not done by then is left out
DEVICE = "cuda"


def layer(name: str, n: int, k: int) -> tuple[nn.Linear, nn.Module]:
    """(a bf16 linear of random weights, the library's module made of it)."""
    linear = nn.Linear(k, n, bias=False, device=DEVICE, dtype=torch.bfloat16)
    same = nn.Linear(k, n, bias=False, device=DEVICE, dtype=torch.bfloat16)
    same.weight.copy_(linear.weight)
    module = COMPARISONS[name].make(same)
    return linear, torch.compile(module, fullgraph=True) if COMPARISONS[name].compiled else module


def activations(m: int, k: int) -> Tensor:
    """x [m, k]; the number of rows is dynamic, because `torch.compile` would compile every size anew."""
    x = torch.randn(m, k, device=DEVICE).bfloat16()
    if m > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def why(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def jobs(groups: dict[str, tuple[int, int]], rows: tuple[int, ...]) -> list[tuple]:
    """The jobs of `warm`."""
    names = (name for name, comparison in COMPARISONS.items() if comparison.compiled or comparison.kernels)
    return [(name, n, k, rows) for name in names for n, k in groups.values()]


def warm(job: tuple[str, int, int, tuple[int, ...]]) -> str | None:
    """Compiles in a process of its own what a library needs for [n, k] and these rows. Returns why it failed, or
    None."""
    name, n, k, rows = job
    try:
        with torch.no_grad():
            _, module = layer(name, n, k)
            for m in rows:
                module(activations(m, k))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # many such processes share the device
    except Exception as error:
        return f"{name} {n}x{k}: {why(error)}"


@torch.no_grad()
def times(
    name: str, groups: dict[str, tuple[int, int]], rows: tuple[int, ...], deadline: float
) -> Iterator[tuple[int, str, float]]:
    """Yields (rows, group, microseconds) of a library.

    Raises what the library raises, ArithmeticError if a result is not the product of x and the weight, TimeoutError."""
    for group, (n, k) in groups.items():
        torch._dynamo.reset()  # Dynamo stops compiling a function after many sizes
        torch.cuda.empty_cache()  # the memory of earlier graphs
        linear, module = layer(name, n, k)
        modules = [module, *(layer(name, n, k)[1] for _ in range(copies(COMPARISONS[name].nbytes * n * k) - 1))]
        for m in rows:
            x = activations(m, k)
            got, want = module(x), linear(x)
            error = ((got - want).norm() / want.norm()).item()
            if not error < 0.3:  # 4 bits on both sides: 0.16
                raise ArithmeticError(f"relative error {error:.2g} at {m} rows")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done {SECONDS} s after the first library began")
            yield m, group, time_us([lambda f=f: f(x) for f in modules], replays=5, least=4)


def compare(groups: dict[str, tuple[int, int]], rows: tuple[int, ...]) -> dict[str, dict[tuple[int, str], float]]:
    """Library -> (rows, group) -> microseconds, of the libraries that run here. A line says why another one does
    not."""
    found, deadline = {}, time.monotonic() + SECONDS
    for name in COMPARISONS:
        try:
            found[name] = {(m, group): us for m, group, us in times(name, groups, rows, deadline)}
        except Exception as error:  # a library that is missing or fails is a result
            print(f"no column for {name}: {why(error)}", flush=True)
    return found
