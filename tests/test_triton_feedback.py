"""Rounding with feedback in Triton against the reference: on a GPU, and interpreted on a CPU.

x, T and F are such that every order of summation gives the same fp32 sums. Then codes and scales are the same bits.
"""

import os
import subprocess
import sys

import pytest
import torch

from wush_compile import feedback as reference
from wush_compile.formats import FORMATS
from wush_compile.ops import core as ops
from wush_compile.ops import layouts

pytest.importorskip("triton")
from wush_compile.kernels.triton.quantize import fused
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.kernels.triton.quantize.tokens import quantize_tokens

gpu = pytest.mark.gpu
DEVICE = "cuda"
RULES = [("mxfp4", rule, g) for rule in ("absmax", "mse", "ocp") for g in (None, 0.5)]
RULES += [("nvfp4", rule, g) for rule in ("absmax", "mse", "search") for g in (None, 0.125)]
rules = pytest.mark.parametrize("format, rule, g", RULES)
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
SIZES = ((1, 64), (3, 96), (17, 576), (37, 1536), (130, 4096), (2100, 4096))


def exact(format, m, k, blocks, block, dtype=torch.bfloat16, seed=0):
    """x [m, k] and T of small integers, F of eighths."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-24, 25, (m, k), generator=generator).to(dtype)
    t = torch.randint(-1, 2, (blocks, block, block), generator=generator).to(dtype)
    f = torch.randint(-4, 5, reference.shape(format, k), generator=generator) / 8
    return x.to(DEVICE), t.to(DEVICE), f.to(torch.bfloat16).to(DEVICE)


def scalar(g):
    return None if g is None else torch.tensor([g], device=DEVICE)


def assert_same(got, want):
    for name, a, b in zip(("codes", "scales"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        wrong = (a != b).sum().item()
        assert wrong == 0, f"{wrong} of {a.numel()} {name} differ, first at {(a != b).nonzero()[0].tolist()}"


@gpu
@rules
@pytest.mark.parametrize("multiple, shared", [(1, False), (1, True), (4, False)])
@pytest.mark.parametrize("m, k", SIZES)
def test_the_reference_bit_for_bit(format, rule, g, multiple, shared, m, k):
    group = FORMATS[format].group_size
    block = group * multiple if k % (group * multiple) == 0 else group
    for dtype in (torch.bfloat16, torch.float16, *([torch.float32] if block <= 64 else [])):
        x, t, f = exact(format, m, k, 1 if shared else k // block, block, dtype)
        got = triton_quantize.transform_quantize(x, t, scalar(g), format, rule, feedback=f)
        assert_same(got, ops._transform_quantize(x, t, scalar(g), format, rule, "rows", f))


@gpu
@both
@pytest.mark.parametrize("tile", [(64, 64, 4, 3, 4), (64, 64, 6, 4, 4), (16, 64, 1, 1, 1), (32, 64, 1, 1, 2)])
@pytest.mark.parametrize("swizzled", [False, True])
def test_tiles_and_layouts(format, tile, swizzled):
    group = FORMATS[format].group_size
    x, t, f = exact(format, 515, 1536, 1536 // group, group)
    more = dict(tile=Tile(*tile), swizzled=swizzled, feedback=f)
    codes, scales = triton_quantize.transform_quantize(x, t, None, format, "mse", **more)
    want = ops._transform_quantize(x, t, None, format, "mse", "rows", f)
    assert_same((codes, scales), (want[0], layouts.swizzle_scales(want[1]) if swizzled else want[1]))


@gpu
@pytest.mark.parametrize("rule", ["absmax", "mse", "search"])
@pytest.mark.parametrize("m, k", [(1, 128), (4, 4096), (63, 1536), (200, 4096)])
def test_lanes(rule, m, k):
    x, t, f = exact("nvfp4", m, k, k // 16, 16)
    if m > 3:
        x[2, 70], x[3, 5] = float("inf"), float("nan")
    g = scalar(0.125)
    got = quantize_tokens(x, t, "nvfp4", lanes=True, global_scale=g, rule=rule, feedback=f)
    want = ops._transform_quantize(x, t, g, "nvfp4", rule, "lanes", f)
    finite = x.isfinite().all(-1)  # a NaN may reach other blocks of its row, as in the product behind
    assert torch.equal(got[0][finite], want[0][finite])
    assert got[0][~finite].isnan().any(-1).all()


@gpu
@rules
@pytest.mark.parametrize("tile", [None, (64, 64, 4, 3, 4)])
def test_values_that_are_not_finite_or_huge(format, rule, g, tile):
    """They stay in their groups. Groups of 2^100 or more are rounded to nearest."""
    group = FORMATS[format].group_size
    x, _, f = exact(format, 240, 512, 512 // group, group)
    t = torch.eye(group, dtype=torch.bfloat16, device=DEVICE).repeat(512 // group, 1, 1)
    x = x * torch.exp2(torch.arange(240, device=DEVICE) - 118.0)[:, None].bfloat16()
    x[5, 3], x[6, 100], x[7, 511], x[66, 40], x[100, 300] = (*map(float, ("nan", "inf", "-inf", "nan")), -3.38e38)
    got = triton_quantize.transform_quantize(x, t, scalar(g), format, rule, tile and Tile(*tile), feedback=f)
    want = ops._transform_quantize(x, t, scalar(g), format, rule, "rows", f)
    assert_same(got, want)
    assert (got[1] == (0xFF if format == "mxfp4" else 0x7F)).sum() == 4


@gpu
@both
def test_real_numbers_cost_the_same(format):
    """One code that flips at a tie changes those of later steps. What the errors cost does not depend on it."""
    group, m, k = FORMATS[format].group_size, 2048, 4096
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).bfloat16().to(DEVICE)
    t = torch.linalg.qr(torch.randn(k // group, group, group, generator=generator))[0].bfloat16().to(DEVICE)
    f = (torch.rand(reference.shape(format, k), generator=generator) * 0.3).bfloat16().to(DEVICE)
    got = triton_quantize.transform_quantize(x, t, None, format, "mse", feedback=f)
    want = ops._transform_quantize(x, t, None, format, "mse", "rows", f)
    assert (got[1] != want[1]).float().mean().item() < 2e-5
    assert (got[0] != want[0]).float().mean().item() < 2e-3


@gpu
@both
@pytest.mark.parametrize("m, k", [(1, 576), (4, 4096), (17, 576), (300, 4096), (3000, 1536)])
def test_fused_ops(format, m, k):
    """A prologue in front changes no bit: the same codes as of the norm or activation itself."""
    group = FORMATS[format].group_size
    x, t, f = exact(format, m, k, k // group, group)
    x, up = (x / 16).bfloat16(), torch.randn(m, k, device=DEVICE).bfloat16()
    weight = torch.rand(k, device=DEVICE).bfloat16()
    t = torch.eye(group, dtype=torch.bfloat16, device=DEVICE).repeat(k // group, 1, 1)  # exact for any x
    tail = (t, None, format, "mse")

    def apart(y):
        return triton_quantize.transform_quantize(y, *tail, feedback=f)

    assert_same(fused.silu_mul_transform_quantize(x, up, *tail, "rows", f), apart(torch.nn.functional.silu(x) * up))
    assert_same(fused.activation_transform_quantize(x, "relu2", *tail, "rows", f), apart(torch.relu(x).square()))
    codes, scales, kept = fused.rms_norm_keep_transform_quantize(x, weight, 1e-5, None, "rounded", *tail, "rows", f)
    assert_same((codes, scales), apart(kept))
    plain = fused.rms_norm_transform_quantize(x, weight, 1e-5, None, "rounded", *tail, "rows", f)
    assert_same(plain, (codes, scales))
    *added, total = fused.add_rms_norm_transform_quantize(x, up, weight, 1e-5, None, "rounded", *tail, "rows", f)
    assert torch.equal(total, (x.float() + up.float()).bfloat16())
    codes, scales, kept = fused.layer_norm_keep_transform_quantize(x, weight, None, 1e-5, None, *tail, "rows", f)
    assert_same((codes, scales), apart(kept))


INTERPRETED = """
import torch
from wush_compile import feedback
from wush_compile.kernels.triton.quantize import fused, transform_quantize as tq
from wush_compile.kernels.triton.quantize.tokens import quantize_tokens
from wush_compile.ops import core as ops
generator = torch.Generator().manual_seed(0)
half, eighth = torch.tensor([0.5]), torch.tensor([0.125])
for format, group, g in (("mxfp4", 32, None), ("mxfp4", 32, half), ("nvfp4", 16, eighth)):
    cases = ((1, 64, group, False), (17, 96, group, True), (70, 256, 64, False), (3, 256, 128, True))
    for m, k, block, shared in cases:
        x = torch.randint(-24, 25, (m, k), generator=generator).bfloat16()
        t = torch.randint(-1, 2, (1 if shared else k // block, block, block), generator=generator).bfloat16()
        f = (torch.randint(-4, 5, feedback.shape(format, k), generator=generator) / 8).bfloat16()
        x[0, 40] = float("nan")
        if m > 16:
            x[16, 5] = 2.0**101
        got = tq.transform_quantize(x, t, g, format, "mse", feedback=f)
        want = ops._transform_quantize(x, t, g, format, "mse", "rows", f)
        assert all(torch.equal(p, q) for p, q in zip(got, want)), (format, m, k, block)
        nearest = ops._transform_quantize(x, t, g, format, "mse")
        assert (nearest[0] != want[0]).float().mean() > 0.1  # else this test shows nothing
        if format == "nvfp4" and k % 128 == 0:
            got = quantize_tokens(x, t, format, lanes=True, global_scale=g, rule="mse", feedback=f)
            want = ops._transform_quantize(x, t, g, format, "mse", "lanes", f)
            assert torch.equal(got[0].nan_to_num(7), want[0].nan_to_num(7)), (m, k)
x = torch.randint(-3, 4, (5, 64), generator=generator).bfloat16()
t = torch.eye(32).bfloat16().repeat(2, 1, 1)
f = (torch.randint(-4, 5, (2, 6, 8), generator=generator) / 8).bfloat16()
tail = (t, None, "mxfp4", "mse", "rows", f)
codes, scales, kept = fused.rms_norm_keep_transform_quantize(x, None, 1e-5, None, "none", *tail)
want = ops._transform_quantize(kept, *tail)
assert torch.equal(codes, want[0]) and torch.equal(scales, want[1])
print("same")
"""


def test_interpreted():
    """The same kernel without a GPU; in its own process, since Triton reads the choice at import."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


def test_calls_that_are_refused():
    from wush_compile.kernels.triton.provider import refuses_transform_quantize as refuses

    x, t, f = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 32, 32).bfloat16(), torch.zeros(2, 6, 8).bfloat16()
    assert refuses(x, t, None, "mxfp4", "mse", "rows", f) is None
    assert "feedback" in refuses(x, None, None, "mxfp4", "mse", "rows", f)
