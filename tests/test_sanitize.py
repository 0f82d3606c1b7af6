"""The calls of sanitize.py, for compute-sanitizer: each reaches its kernel with arguments that fit."""

import importlib
import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import sanitize
from triton.runtime.jit import JITFunction

from wush_compile.kernels import cuda
from wush_compile.kernels import triton as triton_kernels
from wush_compile.kernels.triton.common import memory as triton_memory


@pytest.fixture
def launches(monkeypatch):
    """Names of kernels in the order of their launches, which are left out, on the CPU."""
    launched = []

    def run(self, *args, grid, warmup, **options):
        names = self.signature.parameters
        inspect.signature(self.fn).bind(*args, **{k: v for k, v in options.items() if k in names})
        launched.append(self.fn.__name__)

    def product(x, w, *args, out, **options):
        launched.append("scaled_mm")
        return out

    def ours(*args):
        launched.append("csrc")
        return args[0]

    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_memory, "_workspaces", {})
    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch, "mm", lambda x, w, out=None, out_dtype=None: x.new_empty(x.shape[0], w.shape[1]))
    monkeypatch.setattr(torch, "addmm", lambda *args, out_dtype, out: launched.append("addmm"))
    monkeypatch.setattr(torch, "baddbmm", lambda *args, out_dtype, out: launched.append("baddbmm"))
    monkeypatch.setattr(cuda, "unavailable", lambda capability: None)
    monkeypatch.setattr(cuda, "_target", lambda x: "sm_90a")
    monkeypatch.setattr(
        cuda,
        "load",
        lambda target: type(
            "Library",
            (),
            {
                n: staticmethod(ours)
                for n in (
                    "transform_quantize",
                    "rms_norm_transform_quantize",
                    "add_rms_norm_transform_quantize",
                    "silu_mul_transform_quantize",
                    "fp4_linear",
                    "swizzle_scales",
                )
            },
        ),
    )
    return launched


@pytest.mark.parametrize("group", sanitize.GROUPS)
def test_every_call_is_launched(group, launches):
    names = []
    for name, call in sanitize.cases([group]):
        before = len(launches)
        call()
        assert len(launches) > before, name
        names.append(name)
    assert len(names) == len(set(names)) >= 20


def kernels():
    """Names of all Triton kernels of the package that are launched."""
    found = set()
    for module in pkgutil.walk_packages(triton_kernels.__path__, triton_kernels.__name__ + "."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel"):
                found.add(value.fn.__name__)
    return found


def test_every_kernel_is_called(launches):
    """But those that this GPU does not choose, and those that a package has, which call others."""
    for _, call in sanitize.cases():
        call()
    left_out = {"scaled_gemm_kernel", "grouped_scaled_kernel", "flat_transform_quantize_kernel", "flat_token_kernel"}
    assert kernels() - set(launches) == left_out
