"""The block transform alone, on a GPU: exact on small integers, rounded once."""

import pytest
import torch

from wush_compile.ops import core as ops

pytest.importorskip("triton")
from wush_compile.kernels.triton.quantize.transform import block_transform

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block, shared", [(16, False), (32, False), (32, True), (64, False), (128, False)])
@pytest.mark.parametrize("m, k", [(0, 128), (1, 384), (130, 1536)])
def test_it_is_the_reference_rounded(dtype, block, shared, m, k):
    x = torch.randint(-24, 25, (m, 2 * k), device=DEVICE).to(dtype)[:, k:]
    t = torch.randint(-3, 4, (1 if shared else k // block, block, block), device=DEVICE).to(dtype)
    assert torch.equal(block_transform(x, t), ops.block_transform(x, t).to(dtype))


def test_not_finite_values_stay_in_their_blocks():
    x, t = torch.randn(70, 512, device=DEVICE).bfloat16(), torch.randn(16, 32, 32, device=DEVICE).bfloat16()
    x[5, 40], x[66, 511] = float("nan"), float("inf")
    bad = ~torch.isfinite(block_transform(x, t)).view(70, 16, 32).all(-1)
    assert bad.nonzero().tolist() == [[5, 1], [66, 15]]


def test_what_does_not_fit_is_an_error():
    x, t = torch.zeros(2, 64, device=DEVICE).bfloat16(), torch.zeros(2, 32, 32, device=DEVICE).bfloat16()
    for wrong in (t.float(), t.cpu(), t.repeat(2, 1, 1), t[:, :24, :24]):
        with pytest.raises(ValueError, match="blocks"):
            block_transform(x, wrong)
