"""Tiny random models, quantized by plain rounding, and comparisons that tolerate nothing."""

import hashlib
import inspect
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import wush_compile as wc


class Branches(nn.Module):
    """Two siblings of one input, of different heights, one without a bias; then a linear that is alone."""

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
    """A quantized `Branches` and an input of it."""
    torch.manual_seed(0)
    model, x = Branches(dtype), torch.randn(5, 7, 64, dtype=dtype)
    return quantize(model, x, **settings), x


def quantize(model: nn.Module, *data: Tensor, **settings) -> nn.Module:
    """`wush_compile.quantize` by rounding to nearest, without a progress bar."""
    return wc.quantize(model, list(data), progress=False, **{"solver": "rtn", **settings})


def emulates_rounding() -> bool:
    """Whether Inductor's C++ code heeds `emulate_precision_casts`, by which a compiled model gives eager's bits on a CPU:
    torch 2.13 does, 2.11 keeps fp32 between the ops that it fuses."""
    from torch._inductor.codegen import cpp

    return "emulate_precision_casts" in inspect.getsource(cpp)


def like_eager(actual: Tensor, expected: Tensor, exact: bool) -> bool:
    """Whether a compiled result is eager's: bit for bit, or else up to the codes that other rounding may flip."""
    if exact:
        return torch.equal(actual, expected)
    return bool((actual.float() - expected.float()).norm() <= 0.2 * expected.float().norm())


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
    """sha256 of every file under a directory, by its relative path; seconds do not count."""
    found = {p.relative_to(directory): p.read_bytes() for p in sorted(Path(directory).rglob("*")) if p.is_file()}
    for path in found:
        if path.name == "wush_report.json" or path.match(".wush/stage-*.json"):
            found[path] = json.dumps(_without_seconds(json.loads(found[path]))).encode()
    return {str(path): hashlib.sha256(content).hexdigest() for path, content in found.items()}


def measured(model: nn.Module) -> dict[str, dict]:
    """The report of every group, without seconds."""
    return _without_seconds(model.wush_quantization.report)


def _without_seconds(value: object) -> object:
    """Without the times of a run, and without `after`, a digest that they are part of."""
    if not isinstance(value, dict):
        return value
    return {key: _without_seconds(v) for key, v in value.items() if key not in ("seconds", "after")}
