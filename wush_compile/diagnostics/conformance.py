"""Conformance of every provider, op by op, with the reference and with float64: part of `wush-compile doctor --deep`.

The plain self-test asks only the first provider. This suite calls every provider that runs on the device, at odd
shapes, in every dtype and with every argument. Before each call, memory for the outputs is filled with 0xEE: a byte
that the call does not write is seen.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import feedback, formats
from ..formats import FORMATS
from ..kernels.dispatch import PROVIDERS
from ..kernels.provider import Implementation, implementations
from ..ops import core as ops
from ..ops import fused as fused_ops
from ..ops import layouts
from ..ops.schema import bind
from .draw import FEEDBACK_SHARE, factors_of_rows, feedback_limit, feedback_numbers, signed_permutations

# (rows, K): a single group, odd numbers of groups, sizes that are no multiple of a tile, sizes that fill a GPU.
SHAPES = ((1, 32), (3, 96), (37, 576), (128, 1024), (257, 4096))
# (rows, N, K) of products.
PRODUCTS = (
    (1, 256, 512),
    (2, 200, 1024),
    (5, 72, 96),
    (17, 264, 1024),
    (64, 512, 2048),
    (130, 136, 544),
    (300, 1040, 1024),
)
POISON = 0xEE
# Share of codes that a norm may move. An implementation may divide or take the root in another way: its last bit then
# differs, and with it few codes. The last bit of 1 / root changes 2.2e-5 of the normed bf16 values, and of the bytes of
# codes 3e-6, with feedback 1.3e-5 (benchmarks/trial_feedback_sums.py).
NORM_SHARE = 1e-3


class Result(NamedTuple):
    """One compared call.

    error      share of values that differ, or a product's relative error; None if the call was refused
    refused    the provider's reason
    """

    provider: str
    op: str
    format: str
    case: str
    ok: bool
    error: float | None
    refused: str | None
    seconds: float


def poison(device: torch.device, *tensors: Tensor) -> None:
    """Fills and frees blocks of these tensors' sizes; the allocator gives them to the next outputs of these sizes."""
    blocks = [
        torch.empty(t.numel() * t.element_size(), dtype=torch.uint8, device=device).fill_(POISON)
        for t in tensors
        for _ in range(2)
    ]
    del blocks


def share_different(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """Largest share of differing values, where NaN equals NaN; 1 where shape or dtype differs."""
    same = all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    if not same:
        return 1.0
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a.numel()]
    return max((((a != b) & ~(a.isnan() & b.isnan())).float().mean().item() for a, b in pairs), default=0.0)


def share_of_codes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """`share_different` of the codes; 1 where the scales, which feedback does not change, are not equal."""
    return 1.0 if share_different(got[1:], want[1:]) else share_different(got[:1], want[:1])


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error over the finite entries of `want` (float64); infinite if other entries are finite in `got`."""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    want = want[finite]
    return ((got[finite].double() - want).norm() / want.norm().clamp(min=1e-30)).item()


# -- operands --------------------------------------------------------------------------------------------------------


def spread(rows: int, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values over many octaves, zeros of both signs, tiny rows, and some rows that are not finite."""
    generator = torch.Generator().manual_seed(rows * 1000 + k)
    octaves = torch.randint(-9, 9, (rows, k // 16), generator=generator).float().repeat_interleave(16, 1)
    x = torch.randn(rows, k, generator=generator) * torch.exp2(octaves)
    x[torch.rand(rows, k, generator=generator) < 0.1] *= 0.0
    if rows > 8:
        x[1], x[2] = 0.0, x[2] * 2.0**-12
        x[3, 5], x[4, k - 1], x[5, k // 2] = float("nan"), float("inf"), -float("inf")
    return x.to(dtype).to(device)


def whole(shape: tuple[int, ...], largest: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Small integers: every order of summation gives the same sums of their products."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype).to(device)


def feedback_of(kind: str, format: str, k: int, device: torch.device) -> Tensor:
    return feedback_numbers(kind, format, k, torch.Generator().manual_seed(k)).to(device)


def permutations_of(format: str, k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    group = FORMATS[format].group_size
    return signed_permutations(k // group, group, torch.Generator().manual_seed(k)).to(device, dtype)


def number(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=device)


# -- cases -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A call of an op: `want` computes the reference's result, `share` of the values may differ (of products see
    `_compare`), `error` counts them."""

    format: str
    name: str
    args: tuple
    want: Callable[[], object]
    share: float = 0.0
    error: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], float] = share_different


def quantizer_cases(device: torch.device) -> Iterator[Case]:
    """Any values without a transform; small integers with one, of a matrix for each block or one for all blocks.

    One shape has every dtype and rule, the others bf16 with absmax and mse.
    """
    reference = ops.REFERENCE["transform_quantize"]
    for format, fmt in FORMATS.items():
        group = fmt.group_size
        for rows, k in SHAPES:
            fully = rows == 37
            for dtype in (torch.bfloat16, torch.float16, torch.float32) if fully else (torch.bfloat16,):
                rules = fmt.scale_rules if fully else ("absmax", "mse")
                for rule in rules:
                    g = number(None if format == "int4" else 3.0 if rule == "paper" else 0.37, device)
                    args = (spread(rows, k, dtype, device), None, g, format, rule)
                    name = f"{rows}x{k} {_name(dtype)} {rule}"
                    yield Case(format, name, args, functools.partial(reference, *args))
                    if format in feedback.FORMATS and rule != "paper":
                        yield from _with_feedback(rows, k, dtype, format, rule, g, device)
                for blocks, rule in ((k // group, "absmax"), (k // group, "mse"), (1, "absmax")):
                    if fully or blocks > 1:
                        t = whole((blocks, group, group), 3, dtype, device)
                        args = (whole((rows, k), 24, dtype, device), t, None, format, rule)
                        name = f"{rows}x{k} {_name(dtype)} {rule}, {blocks} matrices"
                        yield Case(format, name, args, functools.partial(reference, *args))


def _with_feedback(
    rows: int, k: int, dtype: torch.dtype, format: str, rule: str, g: Tensor | None, device: torch.device
) -> Iterator[Case]:
    """Integers whose sums of errors are exact, with a matrix for each block and one for all; then real numbers."""
    reference, group = ops.REFERENCE["transform_quantize"], FORMATS[format].group_size
    name = f"{rows}x{k} {_name(dtype)} {rule}, feedback"
    for blocks in (k // group, 1):
        t = 2 * whole((blocks, group, group), 1, dtype, device).clamp(min=0) - 1
        f = feedback_of("eighths", format, k, device)
        args = (whole((rows, k), 24, dtype, device), t, None, format, rule, "rows", f)
        yield Case(format, f"{name} of eighths, {blocks} matrices", args, functools.partial(reference, *args))
    t, f = permutations_of(format, k, dtype, device), feedback_of("any", format, k, device)
    args = (spread(rows, k, dtype, device), t, g, format, rule, "rows", f)
    limit = feedback_limit(rows, k, format)
    yield Case(format, name, args, functools.partial(reference, *args), limit, share_of_codes)


def _fused(op: str, format: str, name: str, inputs: tuple, device: torch.device, share: float = 0.0) -> Iterator[Case]:
    """A fused op without a transform; where the format takes feedback, with it and a transform too."""
    reference, (rows, k) = fused_ops.FUSED_REFERENCE[op], inputs[0].shape
    args = (*inputs, None, None, format, "absmax")
    yield Case(format, name, args, functools.partial(_reference_of_fused, reference, args), share)
    if format in feedback.FORMATS:
        t, f = permutations_of(format, k, inputs[0].dtype, device), feedback_of("any", format, k, device)
        args = (*inputs, t, None, format, "absmax", "rows", f)
        want = functools.partial(_reference_of_fused, reference, args)
        limit, error = (
            feedback_limit(rows, k, format, share or FEEDBACK_SHARE),
            share_different if share else share_of_codes,
        )
        yield Case(format, f"{name}, feedback", args, want, limit, error)


def silu_mul_cases(device: torch.device) -> Iterator[Case]:
    for format in FORMATS:
        for rows, k in SHAPES:
            halves = spread(rows, 2 * k, torch.bfloat16, device)
            inputs = (halves[:, :k], halves[:, k:])
            yield from _fused("silu_mul_transform_quantize", format, f"{rows}x{k}", inputs, device)


def rms_norm_cases(device: torch.device) -> Iterator[Case]:
    """Integers: every order of summation gives the same sum of squares."""
    for format in FORMATS:
        for rows, k in SHAPES:
            for gain in fused_ops.GAINS:
                x = whole((rows, k), 4, torch.bfloat16, device)
                weight = None if gain == "none" else spread(1, k, torch.bfloat16, device)[0]
                inputs = (x, weight, 1e-5, None, gain)
                yield from _fused(
                    "rms_norm_transform_quantize", format, f"{rows}x{k} {gain}", inputs, device, NORM_SHARE
                )


def add_rms_norm_cases(device: torch.device) -> Iterator[Case]:
    """Real numbers: a norm that reads the rounded sum gives more other codes than the order of its sum does."""
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        for rows, k in SHAPES:
            for gain in fused_ops.GAINS:
                x, residual = torch.randn(2, rows, k, generator=generator).to(device, torch.bfloat16)
                weight = None if gain == "none" else spread(1, k, torch.bfloat16, device)[0]
                inputs = (x, residual, weight, 1e-5, None, gain)
                yield from _fused(
                    "add_rms_norm_transform_quantize", format, f"{rows}x{k} {gain}", inputs, device, NORM_SHARE
                )


def _reference_of_fused(reference: Callable, args: tuple) -> tuple[Tensor, ...]:
    """Runs a fused reference on the CPU: on a GPU its inner quantizer would be a provider's."""
    cpu = [a.cpu() if isinstance(a, Tensor) else a for a in args]
    return tuple(t.to(args[0].device) for t in reference(*cpu))


def product_cases(device: torch.device) -> Iterator[Case]:
    """Two quantized operands, with groups that are not finite; with and without all other arguments."""
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        for rows, n, k in PRODUCTS:
            x, w = (
                formats.quantize(torch.randn(m, k, generator=generator).to(device), format, "mse") for m in (rows, n)
            )
            if format != "int4" and rows > 16:
                x[1][rows - 1, 1] = w[1][n // 2, 0] = 0xFF if format == "mxfp4" else 0x7F
            exact = formats.dequantize(*x, format).double() @ formats.dequantize(*w, format).double().T
            bias, residual = (
                torch.randn(size, generator=generator).to(device, torch.bfloat16) for size in ((n,), (rows, n))
            )
            scaled = format == "nvfp4"
            gx, gw = (number(v, device) if scaled else None for v in (0.5, 4.0))
            for dtype in (torch.bfloat16, torch.float32):
                args = (*x, None, *w, None, None, None, format, dtype)
                yield Case(format, f"{rows}x{n}x{k} to {_name(dtype)}", args, functools.partial(torch.clone, exact))
            args = (*x, gx, *w, gw, bias, residual, format, torch.bfloat16)
            want = exact / (2.0 if scaled else 1.0) + bias.double()
            want = want.bfloat16().double() + residual.double()
            yield Case(format, f"{rows}x{n}x{k}, bias, residual", args, functools.partial(torch.clone, want))
            g = factors_of_rows(n, generator).to(device)
            args = (*x, gx, *w, g, bias, residual, format, torch.bfloat16)
            want = exact / g.double() / (0.5 if scaled else 1.0) + bias.double()
            want = want.bfloat16().double() + residual.double()
            yield Case(format, f"{rows}x{n}x{k}, factors of rows", args, functools.partial(torch.clone, want))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = {
    "transform_quantize": quantizer_cases,
    "silu_mul_transform_quantize": silu_mul_cases,
    "rms_norm_transform_quantize": rms_norm_cases,
    "add_rms_norm_transform_quantize": add_rms_norm_cases,
    "fp4_linear": product_cases,
}


# -- run -------------------------------------------------------------------------------------------------------------


def _compare(op: str, implementation: Implementation, case: Case, device: torch.device) -> tuple[float, float]:
    """(error, limit) of one call; where swizzled scales are taken too, the larger error of both layouts."""
    call, want = bind(op, case.args), case.want()
    swizzled = call | {"scale_layout": "swizzled"}
    if op == "fp4_linear":
        dtype = call["out_dtype"]
        swizzled["scales"] = layouts.lay_out(call["scales"], "swizzled")
        outputs = [(torch.empty(want.shape, dtype=dtype, device=device),)] * 2
        compare = lambda got, _: relative_error(got, want)  # noqa: E731
        roundings = 1 if call["residual"] is None else 2  # of a residual's sum too
        limit = roundings * ops.PRODUCT_ERROR[dtype]
    else:
        outputs = [want, (want[0], layouts.lay_out(want[1], "swizzled"), *want[2:])]
        compare, limit = case.error, case.share
    error = 0.0
    for named, expected in zip((call, swizzled), outputs):
        given = tuple(named.values())
        if named is call or implementation.refuses(*given) is None:
            poison(device, *expected)
            error = max(error, compare(implementation.run(*given), expected))
    return error, limit


def check(
    provider: str,
    op: str,
    implementation: Implementation,
    device: torch.device,
    mine: Callable[[int], bool] = lambda index: True,
) -> Iterator[Result]:
    """Runs an op's cases through one implementation. Refusals and failures are results too."""
    for index, case in enumerate(CASES[op](device)):
        if not mine(index):
            continue
        start, name = time.perf_counter(), case.name
        refused = implementation.refuses(*case.args)
        if refused is not None:
            yield Result(provider, op, case.format, name, True, None, refused, 0.0)
            continue
        try:
            error, limit = _compare(op, implementation, case, device)
        except Exception as failure:
            name, error, limit = f"{name}: {type(failure).__name__}: {str(failure).splitlines()[0]}", float("inf"), 0.0
        yield Result(provider, op, case.format, name, error <= limit, error, None, time.perf_counter() - start)


def available(device: torch.device) -> dict[str, dict[str, Implementation]]:
    """Provider -> its ops, for the providers that run on a CUDA device and the reference."""
    capability = torch.cuda.get_device_capability(device)
    table = {p.name: implementations(p) for p in PROVIDERS if p.unavailable(capability) is None}
    takes_all = {op: Implementation(run, lambda *args: None) for op, run in ops.REFERENCE.items()}
    return table | {"reference": takes_all}


def conformance(device: torch.device, mine: Callable[[int], bool] = lambda index: True) -> Iterator[Result]:
    """Runs every provider of a CUDA device, op by op; of each op's cases those with `mine(number)`."""
    for provider, table in available(device).items():
        for op in CASES:
            if op in table:
                yield from check(provider, op, table[op], device, mine)
