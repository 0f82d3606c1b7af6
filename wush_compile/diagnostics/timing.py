"""Times of every provider's quantizers and products on a GPU: replays of CUDA graphs, operands outside the L2 cache.

The same run measures the baselines. A quantizer's baseline is the time to move its bytes at the rate at which its input
is copied (`ideal`); a product's is cuBLAS in bf16.
"""

import itertools
import statistics
import subprocess
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import formats
from ..formats import FORMATS
from .conformance import available

QUANTIZER_SHAPES = ((1, 4096), (16, 4096), (1024, 4096), (4096, 4096), (8192, 14336))  # (rows, K)
WEIGHTS = ((4096, 4096), (28672, 4096))  # (N, K)
ROWS = (1, 16, 128, 1024, 4096)
COLD_BYTES = 2.5e8  # more than any L2 cache: a replay touches so many bytes before it returns to a buffer
QUANTIZERS = ("transform_quantize", "rms_norm_transform_quantize", "silu_mul_transform_quantize")


class Time(NamedTuple):
    """Microseconds of one call; `baseline`: of a copy of the same bytes (quantizers) or of bf16 cuBLAS (products)."""

    provider: str
    op: str
    format: str
    shape: str
    microseconds: float | None
    baseline: float
    note: str


def time_us(calls: list[Callable[[], object]], replays: int = 7, least: int = 10) -> float:
    """Microseconds of one call: the median over replays of a CUDA graph that holds all calls."""
    for call in calls:  # all of them: the first call with a weight also caches facts about it
        call()
    torch.cuda.synchronize()
    calls = (calls * (least // len(calls) + 1))[: max(least, len(calls))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(calls))
    return statistics.median(times)


def copies(nbytes: float, limit: int = 64) -> int:
    """The number of buffers of this size to rotate among, so that none is in the L2 cache at its next turn."""
    return max(2, min(limit, int(COLD_BYTES / nbytes) + 1))


class Plan(NamedTuple):
    """How calls are measured, the number of operands that they rotate among, and which cases run."""

    measure: Callable[[list[Callable[[], object]]], float] = time_us
    copies: Callable[[float], int] = copies
    mine: Callable[[int], bool] = lambda index: True


def run_once(calls: list[Callable[[], object]]) -> float:
    """Replaces a measurement where kernels are only compiled."""
    calls[0]()
    return 1.0


def _timed(plan: Plan, provider, op, format, shape, baseline, calls) -> Time:
    try:
        return Time(provider, op, format, shape, plan.measure(calls), baseline, "")
    except Exception as failure:  # the other cases still run
        note = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        return Time(provider, op, format, shape, None, baseline, note)


def _quantizer_arguments(op: str, x, up, weight, transform, g, format: str) -> tuple:
    tail = (transform, g, format, "absmax")
    if op == "transform_quantize":
        return (x, *tail)
    return (x, up, *tail) if op == "silu_mul_transform_quantize" else (x, weight, 1e-5, None, "rounded", *tail)


def quantizers(device: torch.device, providers: dict, plan: Plan = Plan()) -> Iterator[Time]:
    """Times quantizers and fused ops: bf16 rows, a matrix for each block, absmax."""
    for index, (rows, k) in enumerate(QUANTIZER_SHAPES):
        if not plan.mine(index):
            continue
        xs = [torch.randn(rows, k, device=device).bfloat16() for _ in range(plan.copies(2 * rows * k))]
        ups = [torch.randn(rows, k, device=device).bfloat16() for _ in xs]
        copy = plan.measure([lambda a=a, b=b: a.copy_(b) for a, b in zip(ups, xs, strict=True)])
        weight = torch.randn(k, device=device).bfloat16()
        for format, op in itertools.product(("mxfp4", "nvfp4"), QUANTIZERS):
            group = FORMATS[format].group_size
            t = (torch.randn(k // group, group, group, device=device) / group**0.5).bfloat16()
            g = torch.ones(1, device=device) if format == "nvfp4" else None
            read = 4 if op == "silu_mul_transform_quantize" else 2
            ideal = copy * (read + 0.5 + 1 / group) / 4
            calls = [_quantizer_arguments(op, x, up, weight, t, g, format) for x, up in zip(xs, ups, strict=True)]
            for provider, table in providers.items():
                if op in table and provider != "reference" and table[op].refuses(*calls[0]) is None:
                    run = table[op].run
                    yield _timed(plan, provider, op, format, f"{rows}x{k}", ideal, [lambda c=c: run(*c) for c in calls])


def products(device: torch.device, providers: dict, plan: Plan = Plan()) -> Iterator[Time]:
    """Times products of quantized activations, to bf16."""
    for index, ((n, k), rows) in enumerate(itertools.product(WEIGHTS, ROWS)):
        if not plan.mine(index):
            continue
        x = torch.randn(rows, k, device=device).bfloat16()
        wide = [torch.randn(n, k, device=device).bfloat16() for _ in range(min(8, plan.copies(2 * n * k)))]
        bf16 = plan.measure([lambda w=w: torch.nn.functional.linear(x, w) for w in wide])
        for format in ("mxfp4", "nvfp4"):
            g = torch.ones(1, device=device) if format == "nvfp4" else None
            q = formats.quantize(x, format, "absmax")
            weights = [formats.quantize(wide[0], format, "absmax")]
            weights += [tuple(t.clone() for t in weights[0]) for _ in range(plan.copies(0.53 * n * k) - 1)]
            calls = [(*q, g, *w, g, None, None, format, torch.bfloat16) for w in weights]
            for provider, table in providers.items():
                if "fp4_linear" in table and provider != "reference" and table["fp4_linear"].refuses(*calls[0]) is None:
                    run = table["fp4_linear"].run
                    yield _timed(
                        plan,
                        provider,
                        "fp4_linear",
                        format,
                        f"{rows}x{n}x{k}",
                        bf16,
                        [lambda c=c: run(*c) for c in calls],
                    )


def benchmark(device: torch.device, plan: Plan = Plan()) -> Iterator[Time]:
    """The quantizers, then the products, of every provider of a CUDA device but the reference."""
    providers = available(device)
    yield from quantizers(device, providers, plan)
    yield from products(device, providers, plan)


def machine() -> str | None:
    """Driver, clocks and power as nvidia-smi reports them now; None without nvidia-smi."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,memory.total"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        run = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return f"{query}: {run.stdout.strip()}"
