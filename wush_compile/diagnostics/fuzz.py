"""`wush-compile doctor --fuzz MINUTES`: random calls of every op, each provider against the reference and float64.

A family is one random choice of op, format, widths and options, with many numbers of rows: a width costs a GPU a
compilation, a number of rows does not. Family `index` of a seed is the same in every run and process, so a failure is
found again by its number. Operands are made so that the contract is exact: transforms are signed permutations, whose
sums have one term, and norms read small integers, whose squares add up in any order. Each call runs twice, into memory
that was filled before, and must give the same bits both times.
"""

import concurrent.futures
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import formats
from ..formats import ACTIVATION_FORMATS, FORMATS, WEIGHT_FORMATS, dequantize, get_format
from ..kernels.dispatch import CPU_PROVIDERS
from ..kernels.provider import Implementation, implementations
from ..ops import core as ops
from ..ops import fused as fused_ops
from ..ops import grouped as grouped_ops
from ..ops.schema import bind
from .conformance import NORM_SHARE, available, poison, relative_error, share_different, share_of_codes
from .draw import Draw, factors_of_rows, feedback_limit

PROCESSES = 8  # that compile and run at a time on a GPU
# A kernel may round a weight of 8 bits to the model's dtype, in front of a product.
ROUNDED_WEIGHT = 2**-9
FORMATS_OF_X = (*FORMATS, *ACTIVATION_FORMATS)
# The share of values that may differ behind a GELU by erf, whose last place differs for some gates near -3 to -5.5
# (docs/internals/quantize.md). Up to .0018 was seen, in fp16.
ERF_SHARE = 5e-3


class Case(NamedTuple):
    """One call: `want` computes what is expected, `error(got, want)` is at most `limit` if the call conforms."""

    op: str
    format: str
    words: str
    args: tuple
    want: Callable[[], tuple[Tensor, ...]]
    error: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], float]
    limit: float


class Failure(NamedTuple):
    index: int
    provider: str
    op: str
    format: str
    words: str
    error: str


# -- families --------------------------------------------------------------------------------------------------------


def _dtype(d: Draw, *dtypes: torch.dtype) -> torch.dtype:
    return d.of(torch.bfloat16, torch.bfloat16, *dtypes)


def _rule(d: Draw, format: str) -> tuple[str, Tensor | None]:
    """A scale rule of a format of activations and a global scale that goes with it."""
    if format in ACTIVATION_FORMATS:
        return ACTIVATION_FORMATS[format].scale_rules[0], None
    rule = d.of(*FORMATS[format].scale_rules)
    if format == "int4":
        return rule, None
    if rule == "paper":
        return rule, d.scalar(3.0 if format == "mxfp4" else 10.0)
    # Times MXFP4's smallest scale's inverse, 2^126, a global scale of 4 is infinite.
    return rule, d.scalar(None, None, 0.37, 2.0 if format == "mxfp4" else 512.0)


def _shape(d: Draw, x: Tensor) -> Tensor:
    """Rows, or the same rows with two leading dimensions."""
    return x.unflatten(0, (2, -1)) if x.shape[0] % 2 == 0 and d.of(True, False) else x


def _bound(kind: str, m: int, k: int, format: str) -> tuple[Callable, float]:
    """(error, limit) of codes with this kind of feedback: of all but one the sums of errors are exact."""
    return (share_of_codes, feedback_limit(m, k, format)) if kind == "any" else (share_different, 0.0)


def _quantizer(d: Draw) -> Iterator[Case]:
    format = d.of(*FORMATS_OF_X)
    rule, g = _rule(d, format)
    dtype = _dtype(d, torch.float16, torch.float32)
    unit = FORMATS[format].group_size if format in FORMATS else 16
    k = d.width(unit, 2048 if d.small else 16384)
    t = d.transform(k, unit, dtype)
    layout = d.of("rows", "rows", "swizzled") if format in FORMATS else "rows"
    kind, f = d.feedback(format, rule, k)
    g = d.scalar(None, 0.5, 4.0) if kind == "eighths" else g
    for m in d.rows(k):
        x = d.whole(m, k, dtype) if kind == "eighths" else d.values(m, k, dtype)
        if format == "none" and t is not None:
            x = torch.where(x.isfinite(), x, 1.0).to(dtype)  # a NaN may reach other blocks of its row there
        args = (_shape(d, x), t, g, format, rule, layout, f)
        want = lambda args=args: ops.REFERENCE["transform_quantize"](*args)  # noqa: E731
        words = f"{m}x{k} {dtype} {rule} g={g is not None} transform={None if t is None else tuple(t.shape)} {layout}"
        yield Case("transform_quantize", format, f"{words} feedback={kind}", args, want, *_bound(kind, m, k, format))


def _activation(d: Draw) -> Iterator[Case]:
    """Activations, with a gate and without, in front of the quantizer: PyTorch's own, on the same device."""
    format = d.of(*FORMATS_OF_X)
    rule, g = _rule(d, format)
    dtype = d.of(torch.bfloat16, torch.float16)
    kind = d.of("silu_mul", "silu_mul", "gelu_mul", "swiglu_oai", *fused_ops.ACTIVATIONS)
    unit = FORMATS[format].group_size if format in FORMATS else 16
    k = d.width(unit, 1024 if d.small else 16384)
    approximate = d.of("none", "tanh")
    rounding, f = d.feedback(format, rule, k)
    rounding = "any" if rounding == "eighths" else rounding  # the values are no integers
    t = None if f is None else d.transform(k, unit, dtype)
    for m in d.rows(k):
        x, up = d.values(m, k, dtype), d.values(m, k, dtype)
        tail = (t, g, format, rule, "rows", f)
        if kind == "silu_mul":
            op, args, y = "silu_mul_transform_quantize", (x, up, *tail), torch.nn.functional.silu(x) * up
        elif kind == "gelu_mul":
            op, args = "gelu_mul_transform_quantize", (x, up, approximate, *tail)
            y = torch.nn.functional.gelu(x, approximate=approximate) * up
        elif kind == "swiglu_oai":
            both, limit = torch.stack([x, up], -1).flatten(-2), d.of(7.0, 2.5)
            op, args = "swiglu_oai_transform_quantize", (both, limit, *tail)
            y = fused_ops.swiglu_oai(both, limit)
        else:
            op, args, y = "activation_transform_quantize", (x, kind, *tail), fused_ops.ACTIVATIONS[kind](x)
        want = lambda y=y, tail=tail: ops.REFERENCE["transform_quantize"](y, *tail)  # noqa: E731
        words = f"{m}x{k} {dtype} {kind} {rule} transform={t is not None} feedback={rounding}"
        error, limit = _bound(rounding, m, k, format)
        if kind == "gelu" or (kind == "gelu_mul" and approximate == "none"):
            error, limit = share_different, max(limit, ERF_SHARE, 2 * unit / (m * k))
        yield Case(op, format, words, args, want, error, limit)


def _norm(d: Draw) -> Iterator[Case]:
    format = d.of(*FORMATS)
    rule, g = _rule(d, format)
    dtype = d.of(torch.bfloat16, torch.float16)
    group = FORMATS[format].group_size
    k = d.width(group, 1024 if d.small else 8192)
    op = d.of(
        *("rms_norm", "rms_norm", "add_rms_norm", "layer_norm", "rms_norm_keep", "layer_norm_keep"),
    )
    gain = d.of(*fused_ops.GAINS)
    t = d.transform(k, group, dtype)
    weight = (1 + d.normal(k) / 4).to(dtype)
    _, f = d.feedback(format, rule, k)
    for m in d.rows(k):
        x, r = (torch.randint(-4, 5, (m, k), generator=d.generator).to(dtype).to(d.device) for _ in range(2))
        x, tail = d.strided(x), (t, g, format, rule, "rows", f)
        if "layer" in op:
            args = (x, weight, d.normal(k, dtype=dtype), 1e-5, None, *tail)
        else:
            norm = (None if gain == "none" else weight, 1e-5, None, gain)
            args = (x, r, *norm, *tail) if op == "add_rms_norm" else (x, *norm, *tail)
        reference = fused_ops.FUSED_REFERENCE[f"{op}_transform_quantize"]
        want = lambda args=args, reference=reference: _by_reference(reference, args)  # noqa: E731
        limit = max(NORM_SHARE, 2 / (m * k // 2)) if f is None else feedback_limit(m, k, format, NORM_SHARE)
        words = f"{m}x{k} {dtype} {op} {gain} {rule} transform={t is not None} feedback={f is not None}"
        yield Case(f"{op}_transform_quantize", format, words, args, want, share_different, limit)


def _by_reference(reference: Callable, args: tuple) -> tuple[Tensor, ...]:
    """A fused reference on the CPU by the reference quantizer: on a device its inner quantizer is a provider's."""
    device = args[0].device
    if device.type == "cpu":
        return reference(*args)
    return tuple(t.to(device) for t in reference(*(a.cpu() if isinstance(a, Tensor) else a for a in args)))


def _operand(d: Draw, m: int, k: int, format: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """((codes, scales), values float64) of m random rows; now and then with a group that is not finite."""
    x = d.normal(m, k)
    if format == "none":
        x = x.bfloat16()
        return (x, x.new_empty((m, 0), dtype=torch.float32)), x.double()
    if format == "fp8":
        q = formats.quantize_fp8(x)
        return q, formats.dequantize_fp8(*q).double()
    codes, scales = formats.quantize(x, format, "absmax")
    if format in ("mxfp4", "nvfp4") and m > 16 and d.of(True, False, False):
        scales[d.random.randrange(m), d.random.randrange(scales.shape[1])] = 0xFF if format == "mxfp4" else 0x7F
    return (codes, scales), dequantize(codes, scales, format).double()


def _relative(scale: Tensor) -> Callable:
    """Error of a product relative to its norm, or to what its norm is without cancellation, if that is larger: of few
    results the norm may be next to nothing."""

    def error(got: tuple[Tensor], want: tuple[Tensor]) -> float:
        norm = want[0][want[0].isfinite()].norm()
        return relative_error(got[0], want[0]) * float(norm.clamp(min=1e-30) / norm.clamp(min=1e-30).max(scale))

    return error


def _magnitude(x: Tensor, w: Tensor) -> Tensor:
    """Root of Σ x²w² over all finite results of x wᵀ: the norm of the product of values with random signs."""
    return (x.square() @ w.square().T).nan_to_num(0.0, 0.0, 0.0).sum().sqrt()


def _limit(m: int, n: int, dtype: torch.dtype, roundings: int) -> float:
    """The contract's bound; a mean over few results strays further from it."""
    return roundings * ops.PRODUCT_ERROR[dtype] * (1 + 4 / math.sqrt(m * n))


def _product(d: Draw) -> Iterator[Case]:
    format = d.of(*FORMATS, *WEIGHT_FORMATS)
    activation = d.of("fp8", "none") if format in WEIGHT_FORMATS else d.of("same", "same", "same", "fp8", "none")
    k = d.width(get_format(format).group_size, 1024 if d.small else 8192)
    n = d.size(200 if d.small else 4096)
    gx = d.scalar(None, 0.5) if activation == "same" and format == "nvfp4" else None
    gw = d.scalar(None, 4.0) if format == "nvfp4" else None
    by_rows = d.of(True, False)
    if by_rows:
        gw = factors_of_rows(n, d.generator).to(d.device)
    added, dtype = d.of(True, False), d.of(torch.bfloat16, torch.bfloat16, torch.float32)
    weight, w = _operand(d, n, k, format)
    for g in (gx, gw):
        w = w if g is None else w / g.double()[:, None]
    for m in d.rows(max(k, n)):
        operand, x = _operand(d, m, k, format if activation == "same" else activation)
        bias = d.normal(n, dtype=dtype) if added else None
        residual = d.normal(m, n, dtype=dtype) if added else None
        y = x @ w.T
        size = _magnitude(x, w)
        if added:
            y = (y + bias.double()).to(dtype).double() + residual.double()
        args = (*operand, gx, *weight, gw, bias, residual, format, dtype, "rows", activation)
        limit = _limit(m, n, dtype, 2 if added else 1)
        if format in WEIGHT_FORMATS:
            limit += ROUNDED_WEIGHT
        yield Case(
            *("fp4_linear", format, f"{m}x{n}x{k} {dtype} {activation} added={added} {by_rows=}", args),
            *(lambda y=y: (y,), _relative(size), limit),
        )


def _experts(d: Draw) -> Iterator[Case]:
    format, activation = d.of("mxfp4", "nvfp4"), d.of("same", "same", "fp8", "none")
    k = d.width(get_format(format).group_size, 512 if d.small else 4096)
    n, experts = d.size(100 if d.small else 1024), d.size(8 if d.small else 64)
    gx = d.scalar(None, 0.5) if activation == "same" and format == "nvfp4" else None
    gw = torch.arange(1.0, experts + 1, device=d.device) if format == "nvfp4" and d.of(True, False) else None
    (codes, scales), w = _operand(d, experts * n, k, format)
    weight = [t.view(experts, n, -1) for t in (codes, scales)]
    by_index, dtype = d.of(True, False), torch.bfloat16
    for tokens in d.rows(max(k, n)):
        rows = d.size(tokens * 4) if by_index else tokens
        operand, x = _operand(d, tokens, k, format if activation == "same" else activation)
        index = torch.randint(0, tokens, (rows,), generator=d.generator).to(d.device) if by_index else None
        ends = sorted(d.random.randrange(rows + 1) for _ in range(experts))
        offs = torch.tensor(ends, dtype=torch.int32, device=d.device)
        bias = d.normal(experts, n, dtype=dtype) if d.of(True, False) else None
        taken = x if index is None else x[index]
        y, size = torch.zeros(rows, n, dtype=torch.float64, device=d.device), torch.zeros((), device=d.device).double()
        for e, (start, end) in enumerate(zip([0, *ends], ends)):
            mine = w.view(experts, n, k)[e]
            factor = (1.0 if gx is None else gx.item()) * (1.0 if gw is None else gw[e].item())
            y[start:end] = taken[start:end] @ mine.T / factor + (0.0 if bias is None else bias[e].double())
            size = (size.square() + (_magnitude(taken[start:end], mine) / factor).square()).sqrt()
        args = (*operand, gx, *weight, gw, offs, bias, format, dtype, "rows", activation, index)
        limit = _limit(max(1, ends[-1]), n, dtype, 1)
        words = f"{tokens}->{rows} rows, {experts} experts {n}x{k} {activation} bias={bias is not None}"
        yield Case("fp4_grouped_linear", format, words, args, lambda y=y: (y,), _relative(size), limit)


FAMILIES = (_quantizer, _activation, _norm, _product, _experts)


def family(seed: int, index: int, device: torch.device) -> Iterator[Case]:
    """The cases of a family, by its number."""
    return FAMILIES[index % len(FAMILIES)](Draw(seed, index, device))


# -- run -------------------------------------------------------------------------------------------------------------


def providers(device: torch.device) -> dict[str, dict[str, Implementation]]:
    """Provider -> its ops, for the kernels of a device; of the reference the products, which float64 checks."""
    if device.type == "cuda":
        tables = available(device)
    else:
        tables = {p.name: implementations(p) for p in CPU_PROVIDERS if p.unavailable((0, 0)) is None}
    products = {"fp4_linear": ops.REFERENCE["fp4_linear"], **grouped_ops.GROUPED_REFERENCE}
    return tables | {"reference": {op: Implementation(run, lambda *args: None) for op, run in products.items()}}


def _tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _check(case: Case, implementation: Implementation, device: torch.device) -> str | None:
    """What is wrong with a call; None if nothing is."""
    want, first = case.want(), None
    for _ in range(2):
        poison(device, *(want if first is None else first))
        got = _tuple(implementation.run(*case.args))
        error = case.error(got, want)
        if not error <= case.limit:
            return f"error {error:.3g}, at most {case.limit:.3g}"
        if first is not None and share_different(got, first) > 0:
            return f"a second call differs in {share_different(got, first):.3g} of its values"
        first = got
    return None


def work(
    device: str, seconds: float, seed: int, first: int = 0, step: int = 1, families: int | None = None
) -> tuple[Counter, list[Failure], int]:
    """Families first, first + step, .. of a seed until the time is over, or so many.

    ((provider, op, format, "checked" or "refused") -> calls, failures, families done)."""
    where, end = torch.device(device), time.monotonic() + seconds
    counts, failures, done = Counter(), [], 0
    tables = providers(where)
    with torch.no_grad():
        while time.monotonic() < end and done != families:
            index = first + done * step
            for case in family(seed, index, where):
                if time.monotonic() >= end:
                    break
                args = tuple(bind(case.op, case.args).values())
                for name, table in tables.items():
                    if case.op not in table:
                        continue
                    refused = table[case.op].refuses(*args) is not None
                    counts[name, case.op, case.format, "refused" if refused else "checked"] += 1
                    if refused:
                        continue
                    try:
                        wrong = _check(case, table[case.op], where)
                    except Exception as error:
                        wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    if wrong:
                        failures.append(Failure(index, name, case.op, case.format, case.words, wrong))
            done += 1
    return counts, failures, done


def run(device: torch.device, minutes: float, seed: int = 0) -> tuple[Counter, list[Failure], int]:
    """`work` for so many minutes; on a GPU by several processes, since compilation takes most of the time."""
    if device.type == "cpu":
        return work("cpu", 60 * minutes, seed)
    parts = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    counts, failures, done = Counter(), [], 0
    with concurrent.futures.ProcessPoolExecutor(parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(work, str(device), 60 * minutes, seed, part, parts) for part in range(parts)]
        for job in jobs:
            more, failed, count = job.result()
            counts, done = counts + more, done + count
            failures += failed
    return counts, failures, done
