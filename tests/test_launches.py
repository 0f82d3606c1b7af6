"""What a decoder layer launches on a GPU when one token is decoded, counted without one."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from models import quantized, tokens
from test_passes import run

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from wush_compile.kernels.triton.common import memory
from wush_compile.kernels.triton.provider import IMPLEMENTATIONS
from wush_compile.passes.pattern import arguments, is_wush, value


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels in the order of their launches, which are left out."""
    names = []

    def launch(self, *args, grid, warmup, **options):
        known = self.signature.parameters
        inspect.signature(self.fn).bind(*args, **{k: v for k, v in options.items() if k in known})
        names.append(self.fn.__name__.removesuffix("_kernel"))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *args: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(memory, "_workspaces", {})
    return names


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_a_decoded_token_launches_eight_kernels_a_layer(format, launched):
    """Four products, each behind one quantizer. The three quantizers behind a norm or an activation are one launch with
    it; that of attention's output has a launch of its own (docs/internals/graphs.md)."""
    seen = run(quantized("llama", format, layers=1), tokens(1, 1), use_cache=False)

    def empty(a):
        if not isinstance(a, torch.fx.Node):
            return a
        fake = value(a)
        return torch.zeros(fake.shape, dtype=fake.dtype) if isinstance(fake, torch.Tensor) else fake

    for node in seen.graph.nodes:
        if is_wush(node):
            implementation = IMPLEMENTATIONS[node.target._opname].run
            inspect.unwrap(implementation)(*map(empty, arguments(node).values()))
    assert launched == [
        "norm_quantize",
        "gemv",  # q, k, v
        "transform_quantize",
        "gemv",  # o
        "norm_quantize",
        "gemv",  # gate, up
        "transform_quantize",  # with SiLU
        "gemv",  # down
    ]
