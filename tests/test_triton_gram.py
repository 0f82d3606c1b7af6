"""Second moments on a GPU: of small integers, whose sums are exact in any order, and through the op."""

import pytest
import torch

from wush_compile.ops import core as ops

pytest.importorskip("triton")
from wush_compile.kernels.triton.calibration import moments as triton_gram

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m, k, block",
    [(1, 64, 32), (70, 96, 16), (300, 1536, 32), (5000, 576, 64), (129, 512, 128), (2049, 2048, None), (3, 64, None)],
)
@pytest.mark.parametrize("strided", [False, True])
def test_moment_is_exact(dtype, m, k, block, strided):
    x = torch.randint(-8, 9, (m, 2 * k if strided else k), device=DEVICE).to(dtype)[:, :k]
    start = torch.randint(-9, 9, (k, k) if block is None else (k // block, block, block), device=DEVICE).float()
    got, want = start.clone(), start.clone()
    triton_gram.add_moment(x, got)
    ops._add_moment(x, want)
    assert torch.equal(got, want)


@pytest.mark.parametrize("block", [None, 32])
def test_observe_takes_it(block):
    """Masked rows, a sample, and NaN in a column that stays in its block."""
    k = 256
    x = torch.randint(-8, 9, (4, 100, k), device=DEVICE).bfloat16()
    mask = torch.rand(4, 100, device=DEVICE) < 0.7
    states = []
    for observe in (torch.ops.wush.observe, ops._observe):
        state = (
            torch.zeros((k, k) if block is None else (k // block, block, block), device=DEVICE),
            torch.zeros((), dtype=torch.int64, device=DEVICE),
            torch.zeros(64, k, dtype=x.dtype, device=DEVICE),
        )
        observe(x, mask, *state, 3)
        states.append(state)
    assert all(torch.equal(a, b) for a, b in zip(*states))
    if block is not None:
        x[0, 0, 40] = float("nan")
        triton_gram.add_moment(x.view(-1, k), states[0][0])
        assert states[0][0].isnan().flatten(1).any(1).nonzero().tolist() == [[40 // block]]
