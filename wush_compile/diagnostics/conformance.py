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

from .. import formats
from ..formats import FORMATS
from ..kernels.dispatch import PROVIDERS
from ..kernels.provider import Implementation, implementations
from ..ops import core as ops
from ..ops import fused as fused_ops
from ..ops import layouts
from ..ops.schema import bind

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


def number(value: float | None, device: torch.device) -> Tensor | None:
    return None if value is None else torch.tensor([value], device=device)


# -- cases: (format, name, arguments, reference's result) --------------------------------------------------------------

Case = tuple[str, str, tuple, Callable[[], object]]


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
                for rule in fmt.scale_rules if fully else ("absmax", "mse"):
                    g = number(None if format == "int4" else 3.0 if rule == "paper" else 0.37, device)
                    args = (spread(rows, k, dtype, device), None, g, format, rule)
                    yield format, f"{rows}x{k} {_name(dtype)} {rule}", args, functools.partial(reference, *args)
                for blocks, rule in ((k // group, "absmax"), (k // group, "mse"), (1, "absmax")):
                    if fully or blocks > 1:
                        t = whole((blocks, group, group), 3, dtype, device)
                        args = (whole((rows, k), 24, dtype, device), t, None, format, rule)
                        yield (
                            format,
                            f"{rows}x{k} {_name(dtype)} {rule}, {blocks} matrices",
                            args,
                            functools.partial(reference, *args),
                        )


def silu_mul_cases(device: torch.device) -> Iterator[Case]:
    reference = fused_ops.FUSED_REFERENCE["silu_mul_transform_quantize"]
    for format in FORMATS:
        for rows, k in SHAPES:
            halves = spread(rows, 2 * k, torch.bfloat16, device)
            args = (halves[:, :k], halves[:, k:], None, None, format, "absmax")
            yield format, f"{rows}x{k}", args, functools.partial(_reference_of_fused, reference, args)


def rms_norm_cases(device: torch.device) -> Iterator[Case]:
    """Integers: every order of summation gives the same sum of squares."""
    reference = fused_ops.FUSED_REFERENCE["rms_norm_transform_quantize"]
    for format in FORMATS:
        for rows, k in SHAPES:
            for gain in fused_ops.GAINS:
                x = whole((rows, k), 4, torch.bfloat16, device)
                weight = None if gain == "none" else spread(1, k, torch.bfloat16, device)[0]
                args = (x, weight, 1e-5, None, gain, None, None, format, "absmax")
                yield format, f"{rows}x{k} {gain}", args, functools.partial(_reference_of_fused, reference, args)


def add_rms_norm_cases(device: torch.device) -> Iterator[Case]:
    """Real numbers: a norm that reads the rounded sum gives more other codes than the order of its sum does."""
    reference = fused_ops.FUSED_REFERENCE["add_rms_norm_transform_quantize"]
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        for rows, k in SHAPES:
            for gain in fused_ops.GAINS:
                x, residual = torch.randn(2, rows, k, generator=generator).to(device, torch.bfloat16)
                weight = None if gain == "none" else spread(1, k, torch.bfloat16, device)[0]
                args = (x, residual, weight, 1e-5, None, gain, None, None, format, "absmax")
                yield format, f"{rows}x{k} {gain}", args, functools.partial(_reference_of_fused, reference, args)


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
                yield format, f"{rows}x{n}x{k} to {_name(dtype)}", args, functools.partial(torch.clone, exact)
            args = (*x, gx, *w, gw, bias, residual, format, torch.bfloat16)
            want = exact / (2.0 if scaled else 1.0) + bias.double()
            want = want.bfloat16().double() + residual.double()
            yield format, f"{rows}x{n}x{k}, bias, residual", args, functools.partial(torch.clone, want)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = {
    "transform_quantize": quantizer_cases,
    "silu_mul_transform_quantize": silu_mul_cases,
    "rms_norm_transform_quantize": rms_norm_cases,
    "add_rms_norm_transform_quantize": add_rms_norm_cases,
    "fp4_linear": product_cases,
}
# An implementation may divide or take the root in another way: a norm's last bit then differs, and with it few codes.
TOLERATED = {"rms_norm_transform_quantize": 1e-3, "add_rms_norm_transform_quantize": 1e-3}


# -- run -------------------------------------------------------------------------------------------------------------


def _compare(op: str, implementation: Implementation, args: tuple, want, device: torch.device) -> tuple[float, float]:
    """(error, limit) of one call; where swizzled scales are taken too, the larger error of both layouts."""
    call = bind(op, args)
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
        compare, limit = share_different, TOLERATED.get(op, 0.0)
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
    for index, (format, case, args, reference) in enumerate(CASES[op](device)):
        if not mine(index):
            continue
        start = time.perf_counter()
        refused = implementation.refuses(*args)
        if refused is not None:
            yield Result(provider, op, format, case, True, None, refused, 0.0)
            continue
        try:
            error, limit = _compare(op, implementation, args, reference(), device)
        except Exception as failure:
            case, error, limit = f"{case}: {type(failure).__name__}: {str(failure).splitlines()[0]}", float("inf"), 0.0
        yield Result(provider, op, format, case, error <= limit, error, None, time.perf_counter() - start)


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
