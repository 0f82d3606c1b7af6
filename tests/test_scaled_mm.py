"""torch's scaled_mm as a provider: its operands are right for a CPU stand-in that reads them as cuBLASLt does."""

import pytest
import torch
from torch.nn import functional as F

from wush_compile import formats
from wush_compile.kernels import scaled_mm
from wush_compile.ops import core as ops
from wush_compile.ops import layouts

both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


@pytest.fixture
def library(monkeypatch):
    """F.scaled_mm in float64; checks the recipe, the dtypes and the swizzle."""
    calls = []

    def product(a, b, scale_a, recipe_a, scale_b, recipe_b, swizzle_a, swizzle_b, bias, output_dtype):
        sides, format = [], "nvfp4" if scale_a[0].dtype == torch.float8_e4m3fn else "mxfp4"
        for codes, scales, recipe, swizzle in (
            (a, scale_a, recipe_a, swizzle_a),
            (b.t(), scale_b, recipe_b, swizzle_b),
        ):
            assert codes.dtype == torch.float4_e2m1fn_x2 and codes.is_contiguous()
            assert recipe[0] is (F.ScalingType.BlockWise1x16 if format == "nvfp4" else F.ScalingType.BlockWise1x32)
            assert swizzle[0] is F.SwizzleType.SWIZZLE_32_4_4 and len(scales) == len(recipe) == len(swizzle)
            groups = 2 * codes.shape[1] // formats.FORMATS[format].group_size
            tiles = scales[0].view(torch.uint8).view(layouts.swizzled_shape(codes.shape[0], groups))
            plain = layouts.unswizzle_scales(tiles, codes.shape[0], groups)
            values = formats.dequantize(codes.view(torch.uint8), plain, format).double()
            if len(scales) == 2:
                assert recipe[1] is F.ScalingType.TensorWise and scales[1].dtype == torch.float32
                values = values * scales[1].double()
            sides.append(values)
        calls.append(format)
        y = sides[0] @ sides[1].T
        return (y if bias is None else y + bias.double()).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", product)
    return calls


@both
@pytest.mark.parametrize("scaled", [False, True])
def test_operands_are_what_the_library_reads(library, format, scaled):
    """Rows and groups that are no whole tiles; biases, residuals, global scales, leading dimensions."""
    generator = torch.Generator().manual_seed(0)
    x = formats.quantize(torch.randn(3, 50, 416, generator=generator), format, "absmax")
    w = formats.quantize(torch.randn(80, 416, generator=generator), format, "absmax")
    gx, gw = (torch.tensor([0.5]), torch.tensor([4.0])) if scaled else (None, None)
    bias, residual = torch.randn(80).bfloat16(), torch.randn(3, 50, 80).bfloat16()
    for b, r in ((None, None), (bias, None), (bias, residual)):
        got = scaled_mm.fp4_linear(*x, gx, *w, gw, b, r, format, torch.bfloat16)
        want = ops._fp4_linear(*x, gx, *w, gw, b, r, format, torch.bfloat16)
        assert got.shape == want.shape and got.dtype == want.dtype
        assert ((got - want).abs() > 0.01 * want.abs() + 0.01).sum() == 0
        assert (got != want).float().mean() < 0.01  # fp32 sums against float64 ones
    assert library == [format] * 3


def test_swizzled_weight_scales_follow_the_weight():
    scales = torch.randint(0, 255, (64, 8), dtype=torch.uint8)
    first = scaled_mm.swizzled_weight_scales(scales, "mxfp4")
    assert scaled_mm.swizzled_weight_scales(scales, "mxfp4") is first
    scales[3, 4] = 7
    again = scaled_mm.swizzled_weight_scales(scales, "mxfp4")
    assert again.data_ptr() == first.data_ptr()  # a captured CUDA graph may read it
    assert torch.equal(again.view(torch.uint8), layouts.swizzle_scales(scales).flatten())


def test_a_product_that_fails_or_is_wrong_is_refused(monkeypatch):
    """A small product tries the provider once."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(scaled_mm, "_found", {})
    monkeypatch.setattr(scaled_mm, "_place", lambda device: torch.device("cpu"))

    def broken(*args, **kwargs):
        raise NotImplementedError("not compiled in\nmore")

    monkeypatch.setattr(F, "scaled_mm", broken)
    assert scaled_mm.problem("mxfp4", False, 0) == "NotImplementedError: not compiled in"
    monkeypatch.setattr(F, "scaled_mm", lambda *args: torch.zeros(48, 64, dtype=torch.bfloat16))
    assert "wrong" in scaled_mm.problem("nvfp4", False, 0)
    monkeypatch.setattr(F, "scaled_mm", broken)
    assert "wrong" in scaled_mm.problem("nvfp4", False, 0)  # not tried again


def test_unsupported_calls_are_refused():
    def refuses(m=64, n=64, k=64, format="nvfp4", dtype=torch.bfloat16, bias=None):
        codes, w = torch.zeros(m, k // 2, dtype=torch.uint8), torch.zeros(n, k // 2, dtype=torch.uint8)
        return scaled_mm.refuses_fp4_linear(codes, codes, None, w, w, None, bias, None, format, dtype)

    assert "not an FP4" in refuses(format="int4")
    assert "multiples" in refuses(n=40) and "multiples" in refuses(k=48) and "multiples" in refuses(k=0)
    assert "output" in refuses(dtype=torch.float32) and "bias" in refuses(bias=torch.zeros(64))
    assert "rows" in refuses(m=16) and "rows" in refuses(m=0)
    assert "capability 9.0" in scaled_mm.unavailable((9, 0)) and scaled_mm.unavailable((12, 0)) is None
