"""What computes each op here: device, versions, providers, native or emulated arithmetic, and a short self-test."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import feedback, formats
from ..formats import FORMATS
from ..kernels.dispatch import CPU_PROVIDERS, PROVIDERS, arithmetic, forced, resolve
from ..ops import core as ops
from .draw import feedback_numbers

VERSIONS = ("torch", "triton", "transformers", "wush-compile")
# Numbers of rows that reach every kind of kernel, and the width of the operands.
ROWS = (1, 5, 64, 300)
WIDTH = 512


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Check(NamedTuple):
    """One comparison of an op with its reference. `error`: share of values that differ, or relative error."""

    op: str
    format: str
    case: str
    ok: bool
    error: float
    seconds: float


def _checked(op: str, format: str, case: str, limit: float, error: Callable[[], float]) -> Check:
    """Times `error()`, which passes up to `limit`. If the op itself fails, that is a result too."""
    start = time.perf_counter()
    try:
        found = error()
    except Exception as failure:
        case, found = f"{case}: {type(failure).__name__}: {str(failure).splitlines()[0]}", float("inf")
    return Check(op, format, case, found <= limit, found, time.perf_counter() - start)


def check_transform_quantize(device: torch.device) -> Iterator[Check]:
    """Codes and scales of small integers, bit for bit: every order of summation gives the same sums, of errors too."""
    generator = torch.Generator().manual_seed(0)
    for format, fmt in FORMATS.items():
        group = fmt.group_size
        x = torch.randint(-24, 25, (37, WIDTH), generator=generator).to(device, torch.bfloat16)
        t = torch.randint(-3, 4, (WIDTH // group, group, group), generator=generator).to(device, torch.bfloat16)

        def wrong(*args) -> float:
            got = torch.ops.wush.transform_quantize(*args)
            want = ops.REFERENCE["transform_quantize"](*args)
            return max((a != b).float().mean().item() for a, b in zip(got, want, strict=True))

        for rule in fmt.scale_rules:
            yield _checked("transform_quantize", format, rule, 0.0, lambda: wrong(x, t, None, format, rule))
        if format in feedback.FORMATS:
            f = feedback_numbers("eighths", format, WIDTH, generator).to(device)
            for rule in (r for r in fmt.scale_rules if r != "paper"):
                args = (x, 2 * t.clamp(0, 1) - 1, None, format, rule, "rows", f)
                yield _checked("transform_quantize", format, f"{rule}, feedback", 0.0, lambda: wrong(*args))


def check_fp4_linear(device: torch.device) -> Iterator[Check]:
    """bf16 products at sizes that reach every kind of kernel, against float64 of the same operands."""
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        w = formats.quantize(torch.randn(WIDTH // 2, WIDTH, generator=generator).to(device), format, "absmax")
        wide = formats.dequantize(*w, format).double()

        def relative(rows: int) -> float:
            q = formats.quantize(torch.randn(rows, WIDTH, generator=generator).to(device), format, "absmax")
            got = torch.ops.wush.fp4_linear(*q, None, *w, None, None, None, format, torch.bfloat16)
            want = formats.dequantize(*q, format).double() @ wide.T
            return ((got.double() - want).norm() / want.norm()).item()

        for rows in ROWS:
            yield _checked(
                "fp4_linear", format, f"{rows} rows", ops.PRODUCT_ERROR[torch.bfloat16], lambda: relative(rows)
            )

    codes, scales = formats.quantize(torch.randn(WIDTH // 2, WIDTH, generator=generator), "int8", "absmax")
    codes, scales = codes.to(device), scales.to(device)
    wide = formats.dequantize(codes, scales, "int8").double()

    def of_eight_bits(rows: int) -> float:
        x = torch.randn(rows, WIDTH, generator=generator).to(device, torch.bfloat16)
        none = x.new_empty((rows, 0), dtype=torch.float32)
        args = None, codes, scales, None, None, None, "int8", torch.bfloat16, "rows", "none"
        want = x.double() @ wide.T
        return ((torch.ops.wush.fp4_linear(x, none, *args).double() - want).norm() / want.norm()).item()

    for rows in ROWS:
        bound = ops.PRODUCT_ERROR[torch.bfloat16] + 2**-9  # a weight may be rounded too (docs/spec.md §4)
        yield _checked("fp4_linear", "int8", f"{rows} rows", bound, lambda: of_eight_bits(rows))


def check_observe(device: torch.device) -> Iterator[Check]:
    """Second moments of small integers, exact in any order, and the sample."""

    def wrong() -> float:
        x = torch.randint(-9, 10, (300, 64), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        states = []
        for place, observe in ((device, torch.ops.wush.observe), (torch.device("cpu"), ops.REFERENCE["observe"])):
            state = [torch.zeros(64, 64), torch.zeros((), dtype=torch.int64), torch.zeros(32, 64)]
            state = [s.to(place) for s in state]
            observe(x.to(place), None, *state)
            states.append(state)
        return max((a.cpu() != b).float().mean().item() for a, b in zip(*states, strict=True))

    yield _checked("observe", "", "300 rows", 0.0, wrong)


def check_fp4_grouped_linear(device: torch.device) -> Iterator[Check]:
    """bf16 products of four experts, one of them without rows, at sizes that reach every kind of kernel."""
    generator = torch.Generator().manual_seed(0)
    for format in FORMATS:
        w = formats.quantize(torch.randn(4, WIDTH // 2, WIDTH, generator=generator).to(device), format, "absmax")
        wide = formats.dequantize(*w, format).double()

        def relative(rows: int) -> float:
            q = formats.quantize(torch.randn(rows, WIDTH, generator=generator).to(device), format, "absmax")
            expert = torch.tensor([0, 2, 3])[torch.randint(0, 3, (rows,), generator=generator)].sort().values
            offs = torch.bincount(expert, minlength=4).cumsum(0, dtype=torch.int32).to(device)
            got = torch.ops.wush.fp4_grouped_linear(*q, None, *w, None, offs, None, format, torch.bfloat16)
            x = formats.dequantize(*q, format).double()
            want = torch.cat([x[expert == e] @ wide[e].T for e in range(4)])
            return ((got.double() - want).norm() / want.norm()).item()

        for rows in ROWS:
            limit = ops.PRODUCT_ERROR[torch.bfloat16]
            yield _checked("fp4_grouped_linear", format, f"{rows} rows", limit, lambda: relative(rows))


SELF_TESTS = {
    "observe": check_observe,
    "transform_quantize": check_transform_quantize,
    "fp4_linear": check_fp4_linear,
    "fp4_grouped_linear": check_fp4_grouped_linear,
}


def self_test(device: torch.device, op: str) -> list[Check]:
    """The checks of one op on a device: about a second each, more where kernels have to be compiled first."""
    return list(SELF_TESTS[op](device))


def why_no_gpu() -> str:
    """Why a report about the CPU uses no GPU kernels, with the remedy if there is one."""
    if torch.version.cuda is None:
        return "not used: this torch is built without CUDA; on a machine with a GPU install one with CUDA (pytorch.org)"
    if not torch.cuda.is_available():
        return f"not used: torch {torch.__version__} finds no NVIDIA driver or no GPU; nvidia-smi says which is missing"
    return "not used: the device is the CPU"


def examine(device: torch.device | str | None = None) -> dict:
    """The report on a device (default: the current GPU, else the CPU).

    device, capability, versions    what there is
    forced, providers               WUSH_PROVIDER; provider -> "used" or why not
    ops, arithmetic                 op -> providers in the order in which they are asked; rung -> how it is multiplied
    self_test                       a list of `Check`
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    capability, providers, table = None, {}, {}
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        table = {op: [provider for provider, _ in entries] for op, entries in resolve(index).items()}
        providers = {p.name: p.unavailable(capability) or "used" for p in PROVIDERS}
    else:
        name = device.type
        table = {op: [provider for provider, _ in entries] for op, entries in resolve(None).items()}
        providers = {p.name: why_no_gpu() for p in PROVIDERS}
        providers |= {p.name: p.unavailable(capability) or "used" for p in CPU_PROVIDERS}
    return {
        "device": name,
        "capability": capability,
        "versions": {package: _version(package) for package in VERSIONS} | {"cuda": torch.version.cuda},
        "forced": forced(),
        "providers": providers | {"reference": "always"},
        "ops": {op: [*table.get(op, []), "reference"] for op in SELF_TESTS},
        "arithmetic": {
            **{format: arithmetic(format, capability) for format in FORMATS},
            **{
                f"{format}, {words} activations": arithmetic(format, capability, activation)
                for format in ("mxfp4", "nvfp4", "int8")
                for activation, words in (("fp8", "fp8"), ("none", "16-bit"))
            },
        },
        "self_test": [check for op in SELF_TESTS for check in self_test(device, op)],
    }
