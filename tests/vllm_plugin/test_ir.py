"""The norms of vLLM's own IR, as its graphs on a GPU have them, fuse into the quantizer."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
import vllm.ir  # noqa: F401  (registers the ops)
from torch.fx.experimental.proxy_tensor import make_fx

from wush_compile.graphs.printing import count_ops
from wush_compile.ops import fused  # noqa: F401
from wush_compile.passes import pipeline as passes

wush, ir = torch.ops.wush, torch.ops.vllm_ir


def x(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (5, 64), generator=torch.Generator().manual_seed(seed)).bfloat16()


def fuse(forward, *inputs):
    """(counts of ops before and after, whether the results have the same bits)."""
    traced = make_fx(forward, tracing_mode="fake")(*inputs)
    before = {str(n.target) for n in traced.graph.nodes if "vllm_ir" in str(n.target)}
    want = traced(*inputs)
    passes.run(traced.graph, (passes.fuse_norm,))
    traced.recompile()
    same = all(
        map(torch.equal, torch.utils._pytree.tree_leaves(traced(*inputs)), torch.utils._pytree.tree_leaves(want))
    )
    left = {str(n.target) for n in traced.graph.nodes if "vllm_ir" in str(n.target)}
    return before, left, count_ops(traced.graph), same


def quantize(h):
    return wush.transform_quantize(h, None, None, "mxfp4", "absmax")


@pytest.mark.parametrize("gain", [True, False])
def test_norms(gain):
    def forward(a, b, w):
        w = w if gain else None
        first = quantize(ir.rms_norm(a, w, 1e-6, None))
        h, residual = ir.fused_add_rms_norm(a, b, w, 1e-6, None)
        return first, quantize(h), residual

    before, left, counts, same = fuse(forward, x(0), x(1), x(2, 64))
    assert len(before) == 2 and not left and same
    assert counts == {"rms_norm_transform_quantize": 1, "add_rms_norm_transform_quantize": 1}


@pytest.mark.parametrize("change", ["part of a row", "other dtype", "read elsewhere"])
def test_what_stays(change):
    def forward(a, b, w):
        w = w.float() if change == "other dtype" else w
        h, residual = ir.fused_add_rms_norm(a, b, w, 1e-6, 32 if change == "part of a row" else None)
        return quantize(h), residual, h + 1 if change == "read elsewhere" else residual

    before, left, counts, same = fuse(forward, x(0), x(1), x(2, 64))
    assert before == left and same and counts == {"transform_quantize": 1}
