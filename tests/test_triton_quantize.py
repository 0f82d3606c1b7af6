"""The Triton quantizer against the reference, bit for bit where no order of summation shows: on a GPU, and interpreted
on a CPU."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from wush_compile.formats import FORMATS
from wush_compile.ops import core as ops

pytest.importorskip("triton")
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.ops import layouts

gpu = pytest.mark.gpu
DEVICE = "cuda"
RULES = [("mxfp4", rule, 3.0 if rule == "paper" else None) for rule in FORMATS["mxfp4"].scale_rules]
RULES += [("nvfp4", rule, g) for rule in FORMATS["nvfp4"].scale_rules for g in (None, 0.37, 10.0, 512.0)]
rules = pytest.mark.parametrize("format, rule, g", RULES)
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


def scalar(g, device=DEVICE):
    return None if g is None else torch.tensor([g], device=device)


def assert_same(got, want):
    for name, a, b in zip(("codes", "scales"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        wrong = (a != b).sum().item()
        assert wrong == 0, f"{wrong} of {a.numel()} {name} differ, first at {(a != b).nonzero()[0].tolist()}"


def spread(m, k, dtype, seed=0, device=DEVICE):
    """Values over many octaves, with zeros, subnormals and rows of one value."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-9, 9, (m, k // 16), generator=generator).float().repeat_interleave(16, 1)
    x = torch.randn(m, k, generator=generator) * torch.exp2(octaves)
    x[torch.rand(m, k, generator=generator) < 0.05] = 0
    if m > 3:
        x[1] = 0
        x[2] *= 2.0**-100 if dtype != torch.float16 else 2.0**-12
        x[3] = x[3].sign() * 3
    return x.to(dtype).to(device)


def whole(m, k, blocks, block, dtype, device=DEVICE, seed=0):
    """x and T of small integers: every order of summation gives the same fp32 sums."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-24, 25, (m, k), generator=generator).to(dtype)
    t = torch.randint(-3, 4, (blocks, block, block), generator=generator).to(dtype)
    return x.to(device), t.to(device)


# -- quantize --------------------------------------------------------------------------------------------------------


@gpu
@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m, k", [(1, 32), (3, 96), (37, 576), (130, 1536), (257, 4096)])
def test_quantize_is_the_reference(format, rule, g, dtype, m, k):
    x = spread(m, k, dtype)
    g = scalar(g)
    assert_same(
        triton_quantize.transform_quantize(x, None, g, format, rule), ops._transform_quantize(x, None, g, format, rule)
    )


@gpu
@pytest.mark.parametrize(
    "format, rule", [("mxfp4", "absmax"), ("mxfp4", "mse"), ("nvfp4", "absmax"), ("nvfp4", "mse"), ("nvfp4", "search")]
)
@pytest.mark.parametrize("multiple, shared", [(1, False), (2, False), (1, True), (8, False)])
@pytest.mark.parametrize("m, k", [(1, 256), (33, 768), (64, 1536), (300, 4096), (4100, 4096)])
def test_transform_quantize_is_the_reference(format, rule, multiple, shared, m, k):
    block = FORMATS[format].group_size * multiple
    for dtype in (torch.bfloat16, torch.float16):
        x, t = whole(m, k, 1 if shared else k // block, block, dtype)
        got = triton_quantize.transform_quantize(x, t, None, format, rule)
        assert_same(got, ops._transform_quantize(x, t, None, format, rule))


@gpu
@both
def test_transform_of_real_numbers_differs_at_ties_only(format):
    """The order of an fp32 sum shows where a value lies within its error of a tie: a few codes in a million."""
    block, m, k = FORMATS[format].group_size, 2048, 4096
    x = torch.randn(m, k, device=DEVICE).bfloat16()
    t = torch.linalg.qr(torch.randn(k // block, block, block, device=DEVICE))[0].bfloat16()
    got = triton_quantize.transform_quantize(x, t, None, format, "absmax")
    want = ops._transform_quantize(x, t, None, format, "absmax")
    share = (got[0] != want[0]).float().mean().item()
    assert share < 2e-5 and (got[1] != want[1]).float().mean().item() < 2e-5


@gpu
@both
@pytest.mark.parametrize(
    "tile",
    [
        (64, 64, 1, 1, 4),
        (128, 64, 1, 1, 4),
        (64, 64, 4, 3, 4),
        (64, 64, 6, 4, 4),
        (64, 128, 4, 2, 4),
        (32, 64, 1, 1, 2),
        (32, 64, 4, 3, 2),
        (16, 64, 1, 1, 1),
        (16, 64, 8, 3, 1),
        (16, 128, 1, 1, 4),
        (16, 32, 1, 1, 1),
        (128, 64, 4, 3, 8),
    ],
)
def test_every_tile(format, tile):
    """Compilers have got scale rounding wrong for some tiles and not for others."""
    block = FORMATS[format].group_size
    x, t = whole(515, 1536, 1536 // block, block, torch.bfloat16)
    g = scalar(0.37) if format == "nvfp4" else None
    want = ops._transform_quantize(x, t, g, format, "absmax")
    assert_same(triton_quantize.transform_quantize(x, t, g, format, "absmax", Tile(*tile)), want)


@gpu
@both
@pytest.mark.parametrize(
    "tile", [(16, 256, 1, 1, 4), (8, 512, 1, 1, 4), (1, 512, 1, 1, 2), (4, 1024, 1, 1, 4), (32, 128, 1, 1, 4)]
)
def test_every_tile_without_transform(format, tile):
    x = spread(515, 1536, torch.bfloat16)
    g = scalar(0.37) if format == "nvfp4" else None
    want = ops._transform_quantize(x, None, g, format, "absmax")
    assert_same(triton_quantize.transform_quantize(x, None, g, format, "absmax", Tile(*tile)), want)


@gpu
@both
def test_strided_rows_and_leading_dimensions(format):
    wide = spread(40, 2048, torch.bfloat16)
    x = wide[:, 512:1536].view(5, 8, 1024)
    got = triton_quantize.transform_quantize(x, None, None, format, "absmax")
    assert_same(got, ops._transform_quantize(x.contiguous(), None, None, format, "absmax"))
    x = spread(1024, 48, torch.bfloat16)[:, :40].T
    if format == "nvfp4":
        assert_same(
            triton_quantize.transform_quantize(x[:, :1008], None, None, format, "absmax"),
            ops._transform_quantize(x[:, :1008].contiguous(), None, None, format, "absmax"),
        )
    empty = triton_quantize.transform_quantize(wide[:0], None, None, format, "absmax")
    assert empty[0].shape == (0, 1024)


@gpu
@both
@pytest.mark.parametrize("transform", [False, True])
def test_not_finite_values_stay_in_their_groups(format, transform):
    group = FORMATS[format].group_size
    x, t = whole(70, 512, 512 // group, group, torch.bfloat16)
    x[5, 3], x[6, 100], x[7, 511], x[66, 40] = float("nan"), float("inf"), -float("inf"), float("nan")
    t = t if transform else None
    for tile in (None, (64, 64, 4, 3, 4)):
        tile = tile and Tile(*tile)
        got = triton_quantize.transform_quantize(x, t, None, format, "absmax", tile)
        assert_same(got, ops._transform_quantize(x, t, None, format, "absmax"))
        assert (got[1] == (0xFF if format == "mxfp4" else 0x7F)).sum() == 4


@gpu
@rules
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("tile", [None, (64, 64, 4, 3, 4)])
def test_huge_values_and_saturated_scales(format, rule, g, transform, tile):
    """What the fast rounding cannot hold is done a second time, exactly; the largest finite values included."""
    group = FORMATS[format].group_size
    x, t = whole(140, 512, 512 // group, group, torch.bfloat16)
    t = torch.eye(group, dtype=torch.bfloat16, device=DEVICE).repeat(512 // group, 1, 1) if transform else None
    x = x * torch.exp2(torch.arange(140, device=DEVICE) - 10.0)[:, None].bfloat16()
    x[7, 40], x[100, 300] = 3e38, -3.38e38
    tile = tile and Tile(*tile)
    assert_same(
        triton_quantize.transform_quantize(x, t, scalar(g), format, rule, tile),
        ops._transform_quantize(x, t, scalar(g), format, rule),
    )


@gpu
@both
@pytest.mark.parametrize("m, k", [(0, 64), (1, 64), (3, 96), (130, 192), (257, 576), (512, 1536), (5000, 1024)])
@pytest.mark.parametrize("transform", [False, True])
def test_swizzled_scales(format, m, k, transform):
    """Blackwell's layout of the scales, every byte of the padding written."""
    group = FORMATS[format].group_size
    x, t = whole(m, k, k // group, group, torch.bfloat16)
    x[m // 2 :, :40] = float("nan")
    t = t if transform else None
    for tile in (None, (64, 64, 4, 3, 4), (16, 64, 1, 1, 1)):
        torch.full((2**20,), 0xAA, dtype=torch.uint8, device=DEVICE)  # what the allocator hands out next is not zero
        tile = tile and Tile(*tile)
        codes, scales = triton_quantize.transform_quantize(x, t, None, format, "mse", tile, swizzled=True)
        want = ops._transform_quantize(x, t, None, format, "mse")
        assert_same((codes, scales), (want[0], layouts.swizzle_scales(want[1])))


@gpu
@pytest.mark.parametrize("m, k, block", [(2**20 + 5, 2080, 32), (2**20 + 5, 2080, 0), (2**16 * 17, 32, 0)])
def test_more_elements_than_an_int32_counts(m, k, block):
    x = torch.randint(-24, 25, (m, k), dtype=torch.int8, device=DEVICE).bfloat16()
    t = torch.randint(-3, 4, (k // 32, 32, 32), device=DEVICE).bfloat16() if block else None
    got = triton_quantize.transform_quantize(x, t, None, "mxfp4", "absmax")
    for rows in (slice(0, 100), slice(m // 2, m // 2 + 100), slice(m - 100, m)):
        assert_same([part[rows] for part in got], ops._transform_quantize(x[rows], t, None, "mxfp4", "absmax"))


@gpu
def test_all_e4m3_scales_round_as_the_reference():
    """Every rounding and every tie of the scale, one thread making several: what ptxas 12.8 gets wrong with casts."""
    steps = torch.arange(0, 2**15, dtype=torch.int32)
    amax = (steps.to(torch.float32) / 2**15 * 3000).to(DEVICE)
    x = torch.zeros(2**15, 16, device=DEVICE)
    x[:, 3], x[:, 9] = amax, -amax / 3
    for width, factor in itertools.product((16, 256, 1024), (1, 2.0**-8)):  # and subnormal scales
        rows = factor * x.reshape(-1, width)
        for rule in ("absmax", "mse", "search"):
            assert_same(
                triton_quantize.transform_quantize(rows, None, None, "nvfp4", rule),
                ops._transform_quantize(rows, None, None, "nvfp4", rule),
            )


INTERPRETED = """
from types import SimpleNamespace
import torch
import triton
import triton.language as tl
from wush_compile.ops import layouts
from wush_compile.kernels.triton.quantize import fused, prologue, transform_quantize as tq
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.ops import core as ops
from wush_compile.ops.fused import ACTIVATIONS, swiglu_oai
generator = torch.Generator().manual_seed(0)
cases = [("mxfp4", r, 3.0 if r == "paper" else None) for r in ("absmax", "mse", "ocp", "paper")]
cases += [("nvfp4", "absmax", 0.37), ("nvfp4", "mse", None), ("nvfp4", "search", 0.37)]
for format, rule, g in cases:
    g = None if g is None else torch.tensor([g])
    x = torch.randn(3, 96, generator=generator).bfloat16()
    x[1, 40] = float("nan")
    t = torch.randint(-3, 4, (96 // 32, 32, 32), generator=generator).bfloat16()
    whole = torch.randint(-24, 25, (3, 96), generator=generator).bfloat16()
    whole[2, 70] = float("inf")
    for a, m, tile in ((x, None, Tile(2, 64, 1, 1, 4)), (whole, t, Tile(16, 64, 1, 1, 4))):
        got, want = tq.transform_quantize(a, m, g, format, rule, tile), ops._transform_quantize(a, m, g, format, rule)
        assert all(torch.equal(p, q) for p, q in zip(got, want)), (format, rule)
    codes, scales = tq.transform_quantize(x, None, g, format, rule, tile, swizzled=True)
    want = ops._transform_quantize(x, None, g, format, rule)
    assert torch.equal(codes, want[0]) and torch.equal(scales, layouts.swizzle_scales(want[1])), (format, rule)

# A gate in front, with the exponential that the interpreter has.
@triton.jit
def silu(x):
    return tl.div_rn(x, 1.0 + tl.exp(-x))

prologue.silu = silu
prologue.libdevice = SimpleNamespace(
    exp=lambda x: tl.exp(x), erf=lambda x: tl.erf(x), tanh=lambda x: 1.0 - tl.div_rn(2.0, 1.0 + tl.exp(2.0 * x))
)
for m, k in ((1, 96), (3, 64), (35, 1120)):
    gate = torch.randn(m, k, generator=generator).half()
    up = torch.randint(-4, 5, (m, k), generator=generator).half()
    t = torch.randint(-3, 4, (k // 32, 32, 32), generator=generator).half()
    for transform in (None, t):
        got = fused.silu_mul_transform_quantize(gate, up, transform, None, "mxfp4", "absmax")
        want = ops._transform_quantize(torch.nn.functional.silu(gate) * up, transform, None, "mxfp4", "absmax")
        assert all(torch.equal(p, q) for p, q in zip(got, want)), (m, k)
        for kind, activation in ACTIVATIONS.items():
            got = fused.activation_transform_quantize(gate, kind, transform, None, "mxfp4", "absmax")
            want = ops._transform_quantize(activation(gate), transform, None, "mxfp4", "absmax")
            wrong = [(p != q).float().mean().item() for p, q in zip(got, want)]
            assert max(wrong) <= (0 if transform is None else 2e-3), (kind, m, k, wrong)
    both = 3 * torch.randn(m, 2 * k + 8, generator=generator).half()[:, 4:-4]  # gate and up alternate
    both[0, :4] = torch.tensor([9.0, -9.0, -9.0, 9.0])
    for transform, limit in ((None, 7.0), (t, 7.0), (None, 2.3)):
        got = fused.swiglu_oai_transform_quantize(both, limit, transform, None, "mxfp4", "absmax")
        want = ops._transform_quantize(swiglu_oai(both, limit), transform, None, "mxfp4", "absmax")
        wrong = [(p != q).float().mean().item() for p, q in zip(got, want)]
        assert max(wrong) <= (0 if transform is None else 2e-3), (m, k, wrong)

# Every value of fp16. On a GPU, as here, the cube in gelu_new rounds twice; a CPU's `pow` rounds it once in fp16. The
# interpreter's exponential has another last bit here and there.
@triton.jit
def activate(x, out, KIND: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, prologue.activated(tl.load(x + i), KIND))

x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
gelu_new = lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
for kind in ("relu", "relu2", "silu", "quick_gelu", "gelu_new"):
    out, want = torch.empty_like(x), (gelu_new if kind == "gelu_new" else ACTIVATIONS[kind])(x)
    activate[(1,)](x, out, kind, 2**16)
    wrong = ((out != want) & ~(out.isnan() & want.isnan())).sum().item()
    assert wrong <= (0 if "relu" in kind else 5), (kind, wrong)
print("same")
"""


def test_quantize_interpreted():
    """Triton's interpreter runs the same kernel without a GPU; in its own process, since the choice is made at
    import."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


# -- the registered ops ----------------------------------------------------------------------------------------------


def test_unsupported_calls_are_refused():
    """Everything it reads out of bounds or misreads otherwise; the reference then raises, or computes it."""
    from wush_compile.kernels.triton.provider import refuses_transform_quantize as refuses

    x, t, g = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 32, 32).bfloat16(), torch.ones(1)
    assert refuses(x, t, g, "mxfp4", "mse") is None and refuses(x, None, None, "nvfp4", "absmax") is None
    for wrong in (
        (x.double(), t, g, "mxfp4"),
        (x, t[:, :, :16], g, "mxfp4"),
        (x, t.repeat(2, 1, 1), g, "mxfp4"),
        (x, t[0], g, "mxfp4"),
        (x, t.to("meta"), g, "mxfp4"),
        (x, t, g.double(), "mxfp4"),
        (x, t, torch.ones(2), "mxfp4"),
        (x, t, g.to("meta"), "mxfp4"),
        (x[:, :48], t, g, "mxfp4"),
        (x, t, g, "int4"),
        (x, torch.zeros(1, 24, 24).bfloat16(), g, "mxfp4"),
        (x, t.int(), g, "mxfp4"),
    ):
        assert refuses(*wrong, "absmax") is not None, [getattr(w, "shape", w) for w in wrong]


OPS = """
import torch
from wush_compile.kernels import dispatch
from wush_compile.ops import core as ops
x = torch.randn(70, 512, device="cuda").bfloat16()
for format in ("mxfp4", "nvfp4"):
    for rule in ("absmax", "mse"):
        got = torch.ops.wush.transform_quantize(x, None, None, format, rule)
        assert all(torch.equal(a, b) for a, b in zip(got, ops._transform_quantize(x, None, None, format, rule)))
assert "triton" in [name for name, _ in dispatch.resolve(0)["transform_quantize"]]
try:
    torch.ops.wush.transform_quantize(x, torch.zeros(16, 32, 32), None, "mxfp4", "absmax")
except RuntimeError as error:
    print("refused", type(error).__name__)
"""


@gpu
def test_the_op_runs_this_kernel():
    """In a process of its own, where only this provider is asked."""
    env = os.environ | {"WUSH_PROVIDER": "triton"}
    run = subprocess.run([sys.executable, "-c", OPS], capture_output=True, text=True, env=env)
    assert run.stdout.startswith("refused"), run.stderr[-2000:]
