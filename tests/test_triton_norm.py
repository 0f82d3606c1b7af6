"""A norm in front of the quantizer: which program computes the statistics changes no bit, and no program deadlocks."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import skip_where_triton_interprets_no_loops

from wush_compile.ops import core as ops
from wush_compile.ops import fused as fused_ops

triton = pytest.importorskip("triton")
from wush_compile.kernels.triton.common.memory import workspace
from wush_compile.kernels.triton.quantize.norm import FEW_ROWS, NormPlan, choose_plan, norm_quantize
from wush_compile.kernels.triton.quantize.tiles import Tile

gpu = pytest.mark.gpu
DEVICE = "cuda"
NORMS = ("rms_none", "rms_rounded", "layer_norm")
PLANS = [NormPlan("apart", Tile(16, 64, 1, 1, 1), 1)]
PLANS += [
    NormPlan("ahead", Tile(*tile), rows, ahead)
    for tile, rows, ahead in (
        ((16, 32, 1, 1, 1), 1, 0),
        ((64, 64, 1, 1, 4), 4, 100),
        ((64, 64, 2, 2, 4), 8, 10**6),
        ((64, 64, 8, 3, 4), 2, 0),
        ((64, 64, 8, 3, 4), 2, 10**6),
    )
]

# Interpreted, programs run one after another in the order of their numbers: one that waited for a higher number, or for
# more arrivals than there are, would never end.
INTERPRETED = """
import torch
from torch.nn import functional as F
from wush_compile.kernels.triton.common.memory import workspace
from wush_compile.kernels.triton.quantize.norm import NormPlan, norm_quantize
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.ops import core as ops, fused as fused_ops
generator = torch.Generator().manual_seed(0)
narrow, walking = Tile(16, 32, 1, 1, 4), Tile(16, 64, 2, 2, 4)
cases = [(*shape, "rms_rounded") for shape in ((3, 96), (35, 64), (5, 1120))] + [(35, 64, "layer_norm")]
for m, k, norm in cases:
    x = torch.randint(-12, 13, (m, k), generator=generator).half()
    x[2, 5] = float("nan")
    t = torch.randint(-3, 4, (k // 32, 32, 32), generator=generator).half()
    weight = (1 + 0.1 * torch.randn(k, generator=generator)).half()
    plans = [NormPlan("apart", narrow, 4), NormPlan("ahead", narrow, 2, 1), NormPlan("ahead", walking, 4, 0),
             NormPlan("ahead", walking, 1, 10**6)] + [NormPlan("own", narrow, 4)] * (m <= 4) + [None]
    if norm == "layer_norm":
        want = F.layer_norm(x, (k,), weight, weight, 1e-5)
    else:
        want = fused_ops.rms_norm(x, weight, 1e-5, "rounded")
    want = ops._transform_quantize(want, t, None, "mxfp4", "absmax")
    for plan in plans:
        eps = 1e-5 if plan is None else torch.tensor(1e-5)
        got = norm_quantize(x, weight, weight, eps, norm, t, None, "mxfp4", "absmax", plan)
        first = got if plan == plans[0] else first
        assert all(torch.equal(a, b) for a, b in zip(got, first)), (m, k, norm, plan)
        kept = torch.full_like(x, 7)
        again = norm_quantize(x, weight, weight, eps, norm, t, None, "mxfp4", "absmax", plan, kept)
        assert all(torch.equal(a, b) for a, b in zip(got, again)), (m, k, norm, plan)
        of_kept = ops._transform_quantize(kept, t, None, "mxfp4", "absmax")
        wrong = [(a != b).float().mean().item() for a, b in zip(got, of_kept)]
        assert max(wrong) <= (0 if norm == "rms_rounded" else 1e-3), (m, k, norm, plan, wrong)
        wrong = [(a != b).float().mean().item() for a, b in zip(got, want)]
        assert max(wrong) <= (0 if norm == "rms_rounded" else 1e-2), (m, k, norm, plan, wrong)
        assert (got[1][2] == 255).all()
        if norm == "rms_rounded":  # of a sum that is not rounded first
            other = torch.randn(m, 2 * k, generator=generator).half()[:, :k]
            total, kept = x.float() + other.float(), torch.full_like(x, 7)
            got = norm_quantize(x, weight, None, eps, norm, t, None, "mxfp4", "absmax", plan, kept, other)
            assert torch.equal(kept.nan_to_num(), total.half().nan_to_num()), (m, k, plan)
            normed = fused_ops.rms_norm(total, weight, 1e-5, "rounded", x.dtype)
            of_sum = ops._transform_quantize(normed, t, None, "mxfp4", "absmax")
            wrong = [(a != b).float().mean().item() for a, b in zip(got, of_sum)]
            assert max(wrong) <= 1e-3, (m, k, norm, plan, wrong)
assert not workspace(x.device)._ring.any()
print("same")
"""


def test_norms_interpreted():
    skip_where_triton_interprets_no_loops()
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env, timeout=240)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


def test_plans_fit_what_they_are_for():
    for rows in (1, 3, 4, 5, 16, 64, 100, 1024, 4096, 8192, 2**20):
        for width, block in ((32, 32), (576, 32), (4096, 0), (4096, 32), (14336, 32), (16384, 16), (4096, 256)):
            plan = choose_plan(rows, width, block)
            height = plan.tile.rows * plan.tile.tiles
            assert height % plan.rows == 0 and plan.rows & (plan.rows - 1) == 0
            assert plan.way != "own" or rows <= plan.rows or plan.rows == height
            # Both halves of a counter of arrivals: 15 bits.
            assert height // plan.rows < 2**15 and triton.cdiv(width, plan.tile.columns) < 2**15
            assert plan.way == (
                "own" if rows <= FEW_ROWS else "ahead" if triton.cdiv(rows, height) <= 2**14 else "apart"
            )
            if plan.way == "ahead":  # as many values between a row's statistics and its tiles as fit into L2
                assert plan.ahead * width >= 2**22 - width and plan.ahead >= 128
    assert choose_plan(2**20, 4096, 0).way == "apart"


# -- on a GPU --------------------------------------------------------------------------------------------------------


def operands(m, k, dtype=torch.bfloat16):
    """x, a gain, and signed permutations: with them a product is exact, so that tiles of different shapes agree."""
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    weight = (1 + 0.1 * torch.randn(k, device=DEVICE)).to(dtype)
    order = torch.rand(k // 32, 32, device=DEVICE).argsort()
    t = torch.nn.functional.one_hot(order, 32) * (torch.randint(0, 2, (k // 32, 32, 1), device=DEVICE) * 2 - 1)
    return x, weight, t.to(dtype)


def run(x, weight, t, norm="rms_rounded", plan=None, rule="absmax"):
    gain = None if norm == "rms_none" else weight
    bias = weight if norm == "layer_norm" else None
    return norm_quantize(x, gain, bias, 1e-5, norm, t, None, "mxfp4", rule, plan)


def assert_same(got, want, note=None):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), (note, (a != b).sum().item())


def assert_counters_are_zero():
    assert not workspace(torch.device(DEVICE, torch.cuda.current_device()))._ring.any()


@gpu
@pytest.mark.parametrize(
    "norm, k, rows",
    [
        *((norm, 576, (37, 130)) for norm in NORMS),
        ("rms_rounded", 16384, (300,)),
        ("rms_rounded", 4096, (3, 1100, 4100)),
        ("layer_norm", 2048, (1100,)),
    ],
)
def test_every_way_gives_the_same_bits(norm, k, rows):
    for m, dtype in [(m, torch.bfloat16) for m in rows] + [(rows[0], torch.float16)] * (k == 576):
        x, weight, t = operands(m, k, dtype)
        want = run(x, weight, t, norm, PLANS[0])
        for plan in (*PLANS[1:], None):
            assert_same(run(x, weight, t, norm, plan), want, (m, plan))
    assert_counters_are_zero()


@gpu
def test_few_rows_have_the_bits_that_they_have_among_many():
    for k in (576, 4096, 14336):
        x, weight, t = operands(16, k)
        for block in (t, None):
            want = run(x, weight, block)
            for m in (1, 2, FEW_ROWS, FEW_ROWS + 1):
                assert_same(run(x[:m], weight, block), [part[:m] for part in want], (k, m))
            for rows in (1, 2, 4, 8, 16):
                plan = NormPlan("own", Tile(16, 32, 1, 1, min(rows, 8)), rows)
                assert_same(run(x[:rows], weight, t, plan=plan), [part[:rows] for part in run(x, weight, t)], plan)


@gpu
def test_strided_rows():
    wide = torch.randn(300, 3072, device=DEVICE).bfloat16()
    _, weight, t = operands(1, 1024)
    for m in (1, 300):
        rows = wide[:m, 1024:2048]
        assert_same(run(rows, weight, t), run(rows.contiguous(), weight, t))


@gpu
def test_not_finite_rows_stay_alone():
    x, weight, t = operands(700, 4096)
    bad = x.clone()
    bad[5, 7], bad[300, 500], bad[699, 4000] = float("nan"), float("inf"), -float("inf")
    others = torch.ones(700, dtype=torch.bool, device=DEVICE)
    others[[5, 300, 699]] = False
    for plan in (None, *PLANS):
        got, want = run(bad, weight, t, plan=plan), run(x, weight, t, plan=plan)
        assert_same([part[others] for part in got], [part[others] for part in want], plan)
        assert (got[1][5] == 0xFF).all()


@gpu
def test_a_graph_can_be_replayed():
    x, weight, t = operands(4096, 4096)
    run(x, weight, t)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            got = run(x, weight, t)
    for seed in range(20):
        x.copy_(torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
    want = ops._transform_quantize(fused_ops.rms_norm(x, weight, 1e-5, "rounded"), t, None, "mxfp4", "absmax")
    assert max((a != b).float().mean().item() for a, b in zip(got, want)) <= 2.1e-3
    assert_counters_are_zero()


@gpu
def test_many_streams_at_once():
    """More launches than fit on the GPU: those that wait hold places, and must not need any."""
    streams = [torch.cuda.Stream() for _ in range(12)]
    x, weight, t = operands(3000, 14336)
    want = run(x, weight, t, plan=PLANS[0])
    torch.cuda.synchronize()
    plan, found = NormPlan("ahead", Tile(64, 64, 8, 3, 4), 1, 0), []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(x, weight, t, plan=plan))
    torch.cuda.synchronize()
    for got in found:
        assert_same(got, want)
    assert_counters_are_zero()


@gpu
def test_more_elements_than_an_int32_counts():
    m, k = 2**19 + 5, 4160
    x, weight, t = operands(m, k)
    got = run(x, weight, t)
    for first in (0, m // 2, m - 100):
        rows = slice(first, first + 100)
        assert_same([part[rows] for part in got], run(x[rows].contiguous(), weight, t), first)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_in_front_of_the_norm(dtype):
    """Every way gives the same bits; the sum has the reference's; codes differ by the order of the sum of squares."""
    for m, k in ((1, 576), (3, 4096), (17, 576), (129, 4096), (1100, 4096)):
        x, weight, t = operands(m, k, dtype)
        residual = torch.randn(m, 2 * k, device=DEVICE).to(dtype)[:, :k]  # rows apart
        args = (x, residual, weight, 1e-5, None, "rounded", t, None, "mxfp4", "absmax")
        want = fused_ops.FUSED_REFERENCE["add_rms_norm_transform_quantize"](*args)
        got = torch.ops.wush.add_rms_norm_transform_quantize(*args)
        assert torch.equal(got[2], want[2]), (m, k)
        assert max((a != b).float().mean().item() for a, b in zip(got[:2], want[:2])) <= 2.1e-3, (m, k)
        for plan in PLANS:
            total = torch.empty_like(x)
            other = norm_quantize(
                x, weight, None, 1e-5, "rms_rounded", t, None, "mxfp4", "absmax", plan, total, residual
            )
            assert_same((*other, total), got, (m, k, plan))
    assert_counters_are_zero()
