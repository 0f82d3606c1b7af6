"""Tiny random models, quantized by plain rounding, and comparisons: of bits, or of bits after equal codes."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

import wush_compile as wc
from wush_compile.ops import core as ops

Codes = tuple[Tensor, Tensor]  # what a quantizer returns: codes and scales


class Branches(nn.Module):
    """Two siblings of one input, of different heights, one without a bias; then a linear of its own group."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(64, dtype=dtype)
        self.q = nn.Linear(64, 64, bias=False, dtype=dtype)
        self.k = nn.Linear(64, 32, dtype=dtype)
        self.out = nn.Linear(96, 40, dtype=dtype)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.out(torch.cat((self.q(h), self.k(h)), -1))


def branches(dtype: torch.dtype = torch.float32, **settings) -> tuple[nn.Module, Tensor]:
    """A quantized `Branches` and its input."""
    torch.manual_seed(0)
    model, x = Branches(dtype), torch.randn(5, 7, 64, dtype=dtype)
    return quantize(model, x, **settings), x


def quantize(model: nn.Module, *data: Tensor, **settings) -> nn.Module:
    """`wush_compile.quantize` by rounding to nearest, without a progress bar."""
    return wc.quantize(model, list(data), progress=False, **{"solver": "rtn", **settings})


def emulates_rounding() -> bool:
    """Whether Inductor's C++ code obeys `emulate_precision_casts`, which gives a compiled model eager's bits on a CPU.

    torch 2.13 does. 2.11 keeps fp32 between the ops that it fuses.
    """
    from torch._inductor.codegen import cpp

    return "emulate_precision_casts" in inspect.getsource(cpp)


def skip_where_triton_interprets_no_loops() -> None:
    """Skips where Triton's interpreter fails in a loop to a computed bound: it reads it as numpy once allowed."""
    triton = pytest.importorskip("triton")
    versions = ([int(part) for part in module.__version__.split(".")[:2]] for module in (triton, numpy))
    if next(versions) < [3, 7] and next(versions) >= [2, 4]:
        pytest.skip("needs Triton 3.7 or numpy 2.3")


@contextlib.contextmanager
def watch_cpu(watch: Callable[[Codes], Codes]) -> Iterator[None]:
    """Every quantizer on the CPU, also inside a fused op, returns what `watch` makes of its codes and scales."""
    library, reference = torch.library.Library("wush", "IMPL"), ops.REFERENCE["transform_quantize"]
    library.impl("transform_quantize", lambda *args: watch(reference(*args)), "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def with_equal_codes(
    compiled: Callable[[], Tensor], eager: Callable[[], Tensor], watcher=watch_cpu
) -> tuple[Tensor, Tensor, list[float]]:
    """The compiled result, eager's with the codes of the compiled run, and the share of bytes that differed.

    Inductor and eager round differently, which flips codes that lie near a tie; one flipped code changes all that
    follow. So each quantizer of the eager run goes on with the compiled run's codes: those that differ from its own
    in the fewest bytes. The shares are one number for each quantizer of the eager run, in its order.
    """
    recorded: list[Codes] = []
    used, flipped = set(), []

    def record(result: Codes) -> Codes:
        recorded.append(result)
        return result

    def replay(own: Codes) -> Codes:
        shares = {
            index: (own[0] != codes).float().mean().item()
            for index, (codes, scales) in enumerate(recorded)
            if codes.shape == own[0].shape and scales.shape == own[1].shape and scales.dtype == own[1].dtype
        }
        if not shares:  # a quantizer to 16 bits without a transform: the graph drops it
            return own
        best = min(shares, key=shares.get)
        used.add(best)
        flipped.append(shares[best])
        return recorded[best]

    with watcher(record):
        actual = compiled()
    with watcher(replay):
        replayed = eager()
    assert recorded and used == set(range(len(recorded))), "eager does not quantize all that the compiled model does"
    return actual, replayed, flipped


def assert_like_eager(compiled: Callable[[], Tensor], eager: Callable[[], Tensor], exact: bool) -> None:
    """The compiled result has the bits of eager; or else few codes are flipped, and equal codes give equal values.

    Equal up to 2⁻⁷ of the norm, two roundings to bf16; measured: up to 4.2e-3.
    """
    if exact:
        assert torch.equal(compiled(), eager())
        return
    actual, replayed, flipped = with_equal_codes(compiled, eager)
    assert max(flipped) <= 0.1, flipped  # measured: up to .045
    error = (actual.double() - replayed.double()).norm() / replayed.double().norm()
    assert error <= 2**-7, f"{error:.2e} with equal codes"


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same names, dtypes and bytes."""
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(
        t.dtype == other[n].dtype
        and t.shape == other[n].shape
        and torch.equal(t.reshape(-1).view(torch.uint8), other[n].reshape(-1).view(torch.uint8))
        for n, t in one.items()
    )


def files(directory: Path) -> dict[str, str]:
    """sha256 of every file under a directory, by its relative path; seconds and memory do not count."""
    found = {p.relative_to(directory): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}
    for path in found:
        if path.name == "wush_report.json" or path.match(".wush/stage-*.json"):
            found[path] = json.dumps(_without_seconds(json.loads(found[path]))).encode()
    return {str(path): hashlib.sha256(content).hexdigest() for path, content in found.items()}


def measured(model: nn.Module) -> dict[str, dict]:
    """The report of every group, without seconds."""
    return _without_seconds(model.wush_quantization.report)


def _without_seconds(value: object) -> object:
    """Without the times and the memory of a run, and without `after`, a digest that they are part of."""
    if not isinstance(value, dict):
        return value
    return {key: _without_seconds(v) for key, v in value.items() if key not in ("seconds", "after", "run")}
