"""Activations of 8 and 16 bits in Triton: quantizers against the reference's bits, products against float64."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import skip_where_triton_interprets_no_loops

from wush_compile import formats
from wush_compile.ops import core as ops
from wush_compile.ops import layouts

pytest.importorskip("triton")
from wush_compile.kernels import dispatch
from wush_compile.kernels.triton import provider as triton_provider
from wush_compile.kernels.triton.common import memory as triton_memory
from wush_compile.kernels.triton.linear import choose as triton_choose
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear.choose import Fused, Hopper
from wush_compile.kernels.triton.quantize import fused as triton_fused
from wush_compile.kernels.triton.quantize import transform_quantize as triton_quantize
from wush_compile.kernels.triton.quantize.tokens import quantize_tokens

gpu = pytest.mark.gpu
DEVICE = "cuda"
RULES = {"fp8": "token", "none": "none"}
activations = pytest.mark.parametrize("activation", RULES)
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
ROWS, WIDTHS = (0, 1, 3, 17, 64, 129, 300), (256, 576, 2048)


# -- quantizers ------------------------------------------------------------------------------------------------------


def assert_same(got, want, what=None):
    for name, a, b in zip(("codes", "scales"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (what, name)
        wrong = ((a != b) & ~((a != a) & (b != b))).sum().item()
        assert wrong == 0, f"{what}: {wrong} of {a.numel()} {name} differ"


def spread(m, k, dtype, seed=0):
    """Values over many octaves; a row of zeros, a tiny one, and rows with NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x *= torch.exp2(torch.randint(-9, 9, (m, k // 16), generator=generator).float()).repeat_interleave(16, 1)
    if m > 16:
        x[1], x[2] = 0, x[2] * (2.0**-110 if dtype != torch.float16 else 2.0**-12)
        x[3, 5], x[16, k - 1] = float("nan"), -float("inf")
    return x.to(dtype).to(DEVICE)


def whole(m, k, blocks, block, dtype):
    """x and T of small integers: every order of summation gives the same fp32 sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-24, 25, (m, k), generator=generator).to(dtype)
    t = torch.randint(-3, 4, (blocks, block, block), generator=generator).to(dtype)
    return x.to(DEVICE), t.to(DEVICE)


@gpu
@activations
@pytest.mark.parametrize("k", WIDTHS)
def test_quantize_is_the_reference(activation, k):
    for m in ROWS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = spread(m, k, dtype)
            want = ops._transform_quantize(x, None, None, activation, RULES[activation])
            assert_same(quantize_tokens(x, None, activation), want, (m, dtype))
    assert not triton_memory.workspace(x.device)._ring.any()


@gpu
@activations
@pytest.mark.parametrize("block, shared", [(16, False), (32, False), (32, True), (64, False), (128, False)])
@pytest.mark.parametrize("k", WIDTHS)
def test_transform_quantize_is_the_reference(activation, block, shared, k):
    if k % block:
        return
    for m in ROWS:
        for dtype in (torch.bfloat16, torch.float16):
            x, t = whole(m, k, 1 if shared else k // block, block, dtype)
            if activation == "fp8" and m > 16:
                x[5, 3], x[16, k - 1] = float("nan"), float("inf")
            want = ops._transform_quantize(x, t, None, activation, RULES[activation])
            assert_same(quantize_tokens(x, t, activation), want, (m, dtype))


@gpu
@activations
def test_transform_of_real_numbers_differs_at_ties_only(activation):
    """The order of an fp32 sum shows where a value lies within its error of a tie, or in the last bit of a scale."""
    x = torch.randn(1024, 4096, device=DEVICE).bfloat16()
    t = torch.linalg.qr(torch.randn(128, 32, 32, device=DEVICE))[0].bfloat16()
    got, want = quantize_tokens(x, t, activation), ops._transform_quantize(x, t, None, activation, RULES[activation])
    assert (got[0] != want[0]).float().mean().item() < 2e-3
    if activation == "fp8":
        # A sum of 32 products errs by at most 32 ulps of the sum of their magnitudes; so does a row's maximum.
        largest = ops.block_transform(x.abs(), t.abs()).amax(-1, keepdim=True)
        assert ((got[1] - want[1]).abs() <= 32 * 2.0**-24 * largest / 448).all()
    bits = got[0].to(torch.int32), want[0].to(torch.int32)
    if activation == "fp8":
        assert (bits[0] - bits[1]).abs().max() <= 1  # the next code
    else:
        assert ((got[0].float() - want[0].float()).abs() <= 2.0**-7 * want[0].float().abs() + 1e-6).all()


@gpu
@activations
def test_gates_in_front(activation):
    for m, k in ((0, 576), (3, 576), (129, 2048)):
        gate, (up, t) = torch.randn(m, k, device=DEVICE).bfloat16(), whole(m, k, k // 32, 32, torch.bfloat16)
        activated = torch.nn.functional.silu(gate) * up
        rule = RULES[activation]
        got = triton_fused.silu_mul_transform_quantize(gate, up, None, None, activation, rule)
        assert_same(got, ops._transform_quantize(activated, None, None, activation, rule))
        got = triton_fused.silu_mul_transform_quantize(gate, up, t, None, activation, rule)
        want = ops._transform_quantize(activated, t, None, activation, rule)
        assert (got[0] != want[0]).float().mean().nan_to_num(0).item() < 2e-3


@gpu
@activations
@pytest.mark.parametrize("k", [128, 384, 2048])
def test_the_quantizer_writes_lane_order(activation, k):
    """The same codes at other places, for every number of tiles of a program."""
    for m in ROWS:
        x, t = whole(m, k, k // 32, 32, torch.bfloat16)
        for transform in (None, t, t[:1]):
            codes, scales = quantize_tokens(x, transform, activation)
            got = quantize_tokens(x, transform, activation, lanes=True)
            assert_same(got, (layouts.to_lanes(codes, activation), scales), (m, k))
    gate = spread(33, k, torch.bfloat16)
    args = gate, gate.flip(0).contiguous(), None, None, activation, RULES[activation]
    codes, scales = triton_fused.silu_mul_transform_quantize(*args)
    got = triton_fused.silu_mul_transform_quantize(*args, "lanes")
    assert_same(got, (layouts.to_lanes(codes, activation), scales), "gate")


@gpu
@pytest.mark.parametrize("k", [128, 384, 2048])
@pytest.mark.parametrize("rule", ["absmax", "mse", "search"])
def test_the_quantizer_writes_values_of_nvfp4(rule, k):
    for m in (0, 1, 17, 65, 300):
        x, t = whole(m, k, k // 16, 16, torch.bfloat16)
        for g in (None, torch.tensor([40.0], device=DEVICE)):
            for rows, transform in ((x, None), (x, t), (x, t[:1]), (spread(m, k, torch.bfloat16), None)):
                packed = triton_quantize.transform_quantize(rows, transform, g, "nvfp4", rule)
                got = quantize_tokens(rows, transform, "nvfp4", lanes=True, global_scale=g, rule=rule)
                values = formats.dequantize(*packed, "nvfp4").to(torch.bfloat16)
                assert_same(got, (layouts.to_lanes(values, "none"), packed[1].new_empty(m, 0).float()), (m, k))


@gpu
def test_strided_rows_and_leading_dimensions():
    wide = spread(40, 2048, torch.bfloat16)
    x = wide[:, 512:1536].view(5, 8, 1024)
    for activation, rule in RULES.items():
        want = ops._transform_quantize(x.contiguous(), None, None, activation, rule)
        assert_same(quantize_tokens(x, None, activation), want)


INTERPRETED = """
from types import SimpleNamespace
import torch, triton
import triton.language as tl
from wush_compile import formats
from wush_compile.kernels.triton.common.memory import workspace
from wush_compile.kernels.triton.linear import lane_order
from wush_compile.kernels.triton.quantize import fused, prologue, tokens
from wush_compile.kernels.triton.quantize.tiles import Tile
from wush_compile.ops import core as ops
from wush_compile.ops import layouts
from wush_compile.ops.fused import swiglu_oai
generator = torch.Generator().manual_seed(0)

@triton.jit
def silu(x):
    return tl.div_rn(x, 1.0 + tl.exp(-x))

prologue.silu = silu
prologue.libdevice = SimpleNamespace(exp=lambda x: tl.exp(x))
def same(got, want, what):
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, what
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)

plans = ((Tile(16, 64, 1, 1, 4), 1), (Tile(16, 64, 1, 1, 4), 3), None)
for m, k in ((3, 96), (35, 320)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(m, k, generator=generator) * torch.exp2(torch.randint(-9, 9, (m, k), generator=generator))
        x = x.to(dtype)
        x[1], x[2, 5] = 0, float("nan")
        whole = torch.randint(-24, 25, (m, k), generator=generator).to(dtype)
        whole[2, 70] = float("inf")
        t = torch.randint(-3, 4, (k // 32, 32, 32), generator=generator).to(dtype)
        for format, rule in (("fp8", "token"), ("none", "none")):
            if format == "none":  # the interpreter's rounding to bf16 is not to nearest: sums that need none
                whole, t = whole.clamp(-4, 4), t.clamp(-1, 1)
                whole[2, 70] = float("inf")
            got = tokens.quantize_tokens(x, None, format, plan=(Tile(2, 64, 1, 1, 4), 2))
            same(got, ops._transform_quantize(x, None, None, format, rule), (m, k, dtype, format))
            for plan in plans:
                for some in (t, t[:1]):
                    got = tokens.quantize_tokens(whole, some, format, plan=plan)
                    want = ops._transform_quantize(whole, some, None, format, rule)
                    if format == "none":  # the Inf may reach the neighbours of its block
                        assert not got[0][2, 64:96].isfinite().any()
                        got[0][2], want[0][2] = 0, 0
                    same(got, want, (m, k, dtype, format, plan))
gate = torch.randn(35, 96, generator=generator).half()
up = torch.randint(-4, 5, (35, 96), generator=generator).half()
# One entry a row: gates leave real numbers, and their sums would depend on the order.
t = torch.eye(32)[torch.randperm(32, generator=generator)].mul(-2).half().repeat(3, 1, 1)
activated = torch.nn.functional.silu(gate) * up
for transform in (None, t):
    got = fused.silu_mul_transform_quantize(gate, up, transform, None, "fp8", "token")
    same(got, ops._transform_quantize(activated, transform, None, "fp8", "token"), "gate")
both = 3 * torch.randn(35, 192, generator=generator).half()
got = fused.swiglu_oai_transform_quantize(both, 7.0, t, None, "fp8", "token")
same(got, ops._transform_quantize(swiglu_oai(both, 7.0), t, None, "fp8", "token"), "clamped gate")
got = fused.silu_mul_transform_quantize(gate, up, None, None, "none", "none")
torch.testing.assert_close(got[0], activated, rtol=2e-3, atol=0)
assert not workspace(torch.device("cpu"))._ring.any()

for m, k in ((1, 128), (35, 384)):  # the quantizer's own lane order
    for format, rule in (("fp8", "token"), ("none", "none")):
        whole = torch.randint(-4, 5, (m, k), generator=generator).bfloat16()
        t = torch.randint(-1, 2, (k // 32, 32, 32), generator=generator).bfloat16()
        own = (Tile(16, 64, 1, 1, 4), 1), (Tile(16, 128, 1, 1, 4), 2)
        for transform, plan in ((None, None), (t, None), (t, own[0]), (t, own[1])):
            got = tokens.quantize_tokens(whole, transform, format, plan=plan, lanes=True)
            want = ops._transform_quantize(whole, transform, None, format, rule)
            same(got, (layouts.to_lanes(want[0], format), want[1]), (m, k, format, plan))
            assert torch.equal(layouts.from_lanes(got[0], format), want[0])
    spread = torch.randn(m, k, generator=generator)
    spread *= torch.exp2(torch.randint(-40, 9, (m, k // 32), generator=generator).float()).repeat_interleave(32, 1)
    if m > 1:
        spread[1], spread[2, 5], spread[3, 40], spread[4] = 0, float("nan"), float("inf"), spread[4] * 2.0**-70
        spread[5, 100] = 3e38
    for rule, g in (("absmax", torch.tensor([3.0])), ("mse", None), ("search", None)):
        for x, transform, plan in ((spread, None, None), (whole, t, None), (whole, t, own[0]), (whole, t, own[1])):
            x = x.bfloat16()
            got = tokens.quantize_tokens(x, transform, "nvfp4", plan=plan, lanes=True, global_scale=g, rule=rule)
            same(got, ops._transform_quantize(x, transform, g, "nvfp4", rule, "lanes"), (m, k, rule, plan))

for m, k in ((1, 128), (3, 384), (70, 256)):
    c = torch.arange(k).view(-1, 128)
    o = torch.arange(128)
    lanes = o % 16 // 4 * 32 + o % 64 // 16 * 8 + o // 64 * 4 + o % 4
    halves = torch.cat([o[o % 8 < 4], o[o % 8 >= 4]])
    spread = 2 * (o // 32 % 2 * 32 + o // 2 % 4 * 8 + o // 8 % 4 * 2 + o % 2) + o // 64
    codes = torch.randint(0, 256, (m, k), dtype=torch.uint8, generator=generator)
    assert torch.equal(lane_order.fp8_order(codes).view(torch.uint8), codes[:, c[:, lanes].flatten()])
    assert torch.equal(lane_order.fp8_order(codes, False).view(torch.uint8), codes[:, c[:, halves].flatten()])
    x = torch.randn(m, k, generator=generator).bfloat16()
    assert torch.equal(lane_order.bf16_order(x), x[:, c[:, spread].flatten()])
    assert torch.equal(layouts.lane_channels("fp8"), lanes) and torch.equal(layouts.lane_channels("none"), spread)
    eights = o // 64 * 64 + o % 8 // 2 * 16 + o % 64 // 16 * 4 + o // 8 % 2 * 2 + o % 2
    assert torch.equal(lane_order.int8_order(x), x[:, c[:, eights].flatten()])
    want = formats.dequantize_fp8(codes, torch.ones(1))[:, c[:, spread].flatten()].bfloat16()
    assert torch.equal(lane_order.bf16_order(codes).nan_to_num(7.0), want.nan_to_num(7.0))
print("same")
"""


def test_quantizers_and_orders_interpreted(tmp_path):
    """Triton's interpreter runs the same kernels without a GPU, in a process of its own: it reads TRITON_INTERPRET at
    import."""
    skip_where_triton_interprets_no_loops()
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "interpreted.py"  # Triton reads a kernel's source from its file
    script.write_text(INTERPRETED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


# -- products --------------------------------------------------------------------------------------------------------


def operands(format, activation, m, n, k, octaves=4, dtype=torch.bfloat16):
    """(codes, scales, weight codes, weight scales, float64 product): x has channels of very different size."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(m, k, device=DEVICE, generator=generator)
    x = (x * torch.exp(1.5 * torch.randn(k, device=DEVICE, generator=generator))).to(dtype)
    w = 0.02 * torch.randn(n, k, device=DEVICE, generator=generator)
    w *= torch.exp2(octaves * torch.rand(n, k // 32, device=DEVICE, generator=generator)).repeat_interleave(32, 1)
    weight = formats.quantize(w, format, "absmax")
    operand = ops._transform_quantize(x, None, None, activation, RULES[activation])
    wide = x.double()
    if activation == "fp8":
        wide = formats.dequantize_fp8(operand[0], torch.ones_like(operand[1])).double() * operand[1].double()
    return *operand, *weight, wide @ formats.dequantize(*weight, format).double().T


def product(operands, format, activation, out_dtype, kernel=None, gw=None, bias=None, residual=None):
    c, s, wc, ws = operands[:4]
    return triton_linear.fp4_linear(
        c, s, None, wc, ws, gw, bias, residual, format, out_dtype, kernel, activation_format=activation
    )


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item() if want.numel() else 0.0


FUSED = [
    Fused(64, 16, 128, 1, 4, 4, False),
    Fused(64, 16, 256, 2, 4, 3, False),
    Fused(64, 64, 128, 2, 4, 4, False),
    Fused(128, 128, 128, 1, 8, 3, False),
]
HOPPER = [
    Hopper(128, 64, 2, 2, 7),
    Hopper(128, 128, 2, 4, 5),
    Hopper(128, 192, 2, 3, 3),
    Hopper(256, 32, 4, 1, 7),
    Hopper(256, 128, 4, 1, 4),
]
KERNELS = [None, "bf16", *FUSED, *HOPPER]
# Hopper's fp8 accumulator drops the low bits of a sum. Products of e2m1 and e4m3 have three bits more than those of two
# e2m1 operands (`PRODUCT_ERROR` in fp32), so more is dropped: at most .98e-3 was measured. Sums that go to fp32 every
# 128 channels (`precise`) lose less than half of that.
FP8_SUM_ERROR = 1.2e-3


@gpu
@activations
@both
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_linear_is_the_exact_product(format, activation, kernel):
    """fp32 output within the accumulator's error of the float64 product, bf16 output with one rounding more; with every
    optional operand too. A product of two bf16 operands is exact but for fp32 sums."""
    fp8 = format == "mxfp4" and activation == "fp8" and kernel != "bf16" and triton_linear.capability(0) == (9, 0)
    for m in ROWS:
        n, k = (264, 576) if kernel in (None, "bf16") and m % 2 else (1040, 2048)
        o = operands(format, activation, m, n, k)
        got = error(product(o, format, activation, torch.float32, kernel), o[4])
        assert got < (FP8_SUM_ERROR if fp8 else 1e-5), (m, got)
        got = error(product(o, format, activation, torch.bfloat16, kernel), o[4])
        assert got < ops.PRODUCT_ERROR[torch.bfloat16], (m, got)
        gw, bias = torch.tensor([3.0], device=DEVICE), torch.randn(n, device=DEVICE).bfloat16()
        residual = torch.randn(m, n, device=DEVICE).bfloat16()
        got = product(o, format, activation, torch.bfloat16, kernel, gw, bias, residual)
        assert error(got, o[4] / 3 + bias.double() + residual.double()) < 4e-3, m


@gpu
def test_precise_sums_of_fp8_products():
    """What fp32 output loses is the accumulator's: it falls where sums go to fp32 every 128 channels."""
    for m in (1, 17, 129):
        o = operands("mxfp4", "fp8", m, 1040, 2048)
        c, s, wc, ws = o[:4]
        errors = [
            error(
                triton_linear.fp4_linear(
                    c,
                    s,
                    None,
                    wc,
                    ws,
                    None,
                    None,
                    None,
                    "mxfp4",
                    torch.float32,
                    FUSED[0],
                    precise,
                    activation_format="fp8",
                ),
                o[4],
            )
            for precise in (False, True)
        ]
        print(m, errors)
        assert errors[1] < ops.PRODUCT_ERROR[torch.float32] and errors[1] < errors[0] < FP8_SUM_ERROR


@gpu
@activations
@both
def test_every_chosen_kernel_is_the_reference(format, activation):
    """What `choose_decoding` takes, at the shapes where its answers differ; the registered op computes the same."""
    for m, (n, k) in (
        (1, (4096, 2048)),
        (16, (9216, 1024)),
        (48, (4096, 2048)),
        (130, (4096, 2048)),
        (1030, (2048, 512)),
    ):
        o = operands(format, activation, m, n, k, octaves=0)
        got = product(o, format, activation, torch.bfloat16)
        assert error(got, o[4]) < ops.PRODUCT_ERROR[torch.bfloat16], (m, n, k)
        args = (*o[:2], None, *o[2:4], None, None, None, format, torch.bfloat16, "rows", activation)
        assert dispatch.chosen("fp4_linear", 0, args) == "triton"
        assert torch.equal(torch.ops.wush.fp4_linear(*args), got)


@gpu
@pytest.mark.parametrize("format, activation", [("mxfp4", "fp8"), ("mxfp4", "none"), ("nvfp4", "none")])
def test_products_read_lane_order(format, activation):
    """The same bits as from rows, from every kernel; the op takes the same provider."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's products read it")
    for m, (n, k) in ((1, (4096, 2048)), (16, (9216, 1024)), (130, (4096, 2048)), (1030, (2048, 512)), (9, (64, 384))):
        o = operands(format, activation, m, n, k, octaves=0)
        ordered = layouts.to_lanes(o[0], activation), o[1]
        for kernel in (None, "library", "bf16", FUSED[0], HOPPER[0]):
            if kernel == "library" and (activation, n % 16) != ("fp8", 0):
                continue
            options = dict(kernel=kernel, activation_format=activation)
            rest = None, *o[2:4], None, None, None, format, torch.bfloat16
            want = triton_linear.fp4_linear(*o[:2], *rest, **options)
            got = triton_linear.fp4_linear(*ordered, *rest, **options, lanes=True)
            # The library, which None takes at 1030 rows, may add the channels in another order: two sums that differ
            # by what its accumulator drops are then rounded to bf16.
            bound = ops.PRODUCT_ERROR[torch.bfloat16]
            if kernel in (None, "library", "bf16"):
                assert error(got, want.double()) < bound, (m, n, k, kernel)
            else:
                assert torch.equal(got, want), (m, n, k, kernel)
            assert error(got, o[4]) < bound, (m, n, k, kernel, error(want, o[4]))
        args = (*ordered, *rest, "lanes", activation)
        assert dispatch.chosen("fp4_linear", 0, args) == "triton"
        assert error(torch.ops.wush.fp4_linear(*args), o[4]) < ops.PRODUCT_ERROR[torch.bfloat16]
    assert "no layout lanes" in dispatch.resolve(0)["fp4_linear"][-1][1].refuses(
        *ordered, None, *o[2:4], None, None, None, "int4", torch.bfloat16, "lanes", activation
    )


@gpu
@pytest.mark.parametrize("g", [None, 2.0, 3.0])
def test_products_read_values_of_nvfp4(g):
    """The same bits as from packed rows, by every kernel that expands them."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("only Hopper's products read them")
    g = None if g is None else torch.tensor([g], device=DEVICE)
    for m, (n, k) in (
        (17, (4096, 2048)),
        (48, (9216, 1024)),
        (130, (4096, 2048)),
        (1030, (2048, 512)),
        (33, (64, 384)),
    ):
        x = torch.randn(m, k, device=DEVICE).bfloat16()
        weight = formats.quantize(0.02 * torch.randn(n, k, device=DEVICE), "nvfp4", "absmax")
        packed = triton_quantize.transform_quantize(x, None, g, "nvfp4", "absmax")
        lanes = quantize_tokens(x, None, "nvfp4", lanes=True, global_scale=g, rule="absmax")
        rest = g, *weight, None, None, None, "nvfp4", torch.bfloat16
        for kernel in (FUSED[0], HOPPER[0], "bf16"):
            want = triton_linear.fp4_linear(*packed, *rest, kernel)
            got = triton_linear.fp4_linear(*lanes, *rest, kernel, lanes=True)
            exact = not isinstance(kernel, str)
            assert torch.equal(got, want) if exact else error(got, want.double()) < 2e-3, (m, n, k, kernel)
        args = (*lanes, *rest, "lanes")
        assert dispatch.chosen("fp4_linear", 0, args) == "triton"
        assert error(torch.ops.wush.fp4_linear(*args), want.double()) < 2e-3
    assert "stay packed" in triton_provider.refuses_fp4_linear(*(t[:16] for t in lanes), *rest, "lanes")


@gpu
def test_library_in_e4m3():
    for m in (17, 300, 1100):
        o = operands("mxfp4", "fp8", m, 512, 1024, octaves=0)
        assert triton_memory.row_facts(o[3]).fits_e4m3
        got = product(o, "mxfp4", "fp8", torch.bfloat16, "library", torch.tensor([2.0], device=DEVICE))
        assert error(got, o[4] / 2) < ops.PRODUCT_ERROR[torch.bfloat16], m


@gpu
@activations
@both
@pytest.mark.parametrize("kernel", [None, "bf16", FUSED[0], HOPPER[0]], ids=str)
def test_not_finite_rows_stay_in_their_rows(format, activation, kernel):
    for m in (1, 17, 129):
        o = operands(format, activation, m, 128, 1024)
        o[3][100, 9] = 0xFF if format == "mxfp4" else 0x7F
        if activation == "fp8":
            o[1][m - 1], o[0][m - 1] = float("nan"), 0
        else:
            o[0][m - 1, 7] = float("nan")
        bad = torch.zeros(m, 128, dtype=torch.bool, device=DEVICE)
        bad[m - 1], bad[:, 100] = True, True
        assert torch.equal(product(o, format, activation, torch.bfloat16, kernel).isnan(), bad), m


@gpu
@pytest.mark.parametrize("kernel", [None, "bf16", FUSED[1], HOPPER[1], HOPPER[4]], ids=str)
def test_mxfp4_in_bf16_holds_scales_that_are_far_apart(kernel):
    """Groups 60 octaves apart in a row, rows 40 octaves apart: every single group's product is exact."""
    c, s, wc, ws, _ = operands("mxfp4", "none", 64, 256, 1024, octaves=0)
    ws = ws.clone()
    ws[:, ::2] -= 60
    ws[7] -= 40
    c = c.view(64, -1, 32) * (torch.arange(32, device=DEVICE) % 2 == 0)[:, None]  # meets the small groups alone
    c = c.view(64, 1024).bfloat16()
    want = c.double() @ formats.dequantize(wc, ws, "mxfp4").double().T
    got = product((c, s, wc, ws), "mxfp4", "none", torch.float32, kernel)
    for rows in (slice(7, 8), slice(8, 256)):
        assert error(got[:, rows], want[:, rows]) < 1e-5


@gpu
@pytest.mark.parametrize("m", [1, 17, 300])
def test_other_weights_and_dtypes_take_bf16_terms(m):
    """fp16 activations and int4 weights: exact in two bf16 terms."""
    for format, activation, dtype in (
        ("mxfp4", "none", torch.float16),
        ("nvfp4", "none", torch.float16),
        ("int4", "none", torch.bfloat16),
        ("int4", "fp8", torch.bfloat16),
        ("int4", "none", torch.float16),
    ):
        o = operands(format, activation, m, 72, 576, dtype=dtype)
        assert error(product(o, format, activation, torch.float32), o[4]) < 1e-5, (format, activation, dtype)
        rounded = product(o, format, activation, torch.float16)
        assert rounded.dtype == torch.float16 and error(rounded, o[4]) < 1e-3


# -- which calls, which kernels --------------------------------------------------------------------------------------


def test_choices_decode_only_the_weight():
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
        for decoded in ("mxfp4", "mxfp4_bf16", "nvfp4", "int4"):
            for m in (1, 2, 3, 4, 16, 64, 300, 5000):
                for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (512, 576)):
                    kernel = triton_choose.choose_decoding(decoded, m, n, k, capability)
                    assert isinstance(kernel, str | Fused | Hopper)
                    assert not isinstance(kernel, Fused) or not kernel.packed
                    assert kernel == "bf16" or (k % 128 == 0 and decoded != "int4" and capability < (10, 0))
    assert triton_choose.choose_decoding("mxfp4", 5000, 28672, 4096) == "library"
    assert isinstance(triton_choose.choose_decoding("mxfp4", 5000, 28672, 4096, library=False), Hopper)
    assert triton_choose.decoded_format("mxfp4", "fp8", (9, 0)) == "mxfp4"
    for activation, capability in (("fp8", (8, 9)), ("none", (9, 0))):
        assert triton_choose.decoded_format("mxfp4", activation, capability) == "mxfp4_bf16"


def test_what_is_refused():
    x, t, vector = torch.zeros(2, 64).bfloat16(), torch.zeros(2, 32, 32).bfloat16(), torch.ones(64).bfloat16()
    quantizer, linear = triton_provider.refuses_transform_quantize, triton_provider.refuses_fp4_linear
    w = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2, dtype=torch.uint8)
    for activation, rule in RULES.items():
        assert quantizer(x, t, None, activation, rule) is None
        assert "rule" in quantizer(x, t, None, activation, "absmax")
        assert "not in the layout swizzled" in quantizer(x, t, None, activation, rule, "swizzled")
        assert triton_provider.refuses_silu_mul(x, x, t, None, activation, rule) is None
        norm = triton_provider.refuses_rms_norm(x, vector, 1e-6, None, "rounded", t, None, activation, rule)
        assert "norm" in norm  # `lower` then takes the op apart
        q = ops._transform_quantize(x, None, None, activation, rule)
        assert linear(*q, None, *w, None, None, None, "mxfp4", torch.bfloat16, "rows", activation) is None
    args = x.float(), torch.zeros(2, 0), None, *w, None, None, None, "mxfp4", torch.float32, "rows", "none"
    assert "torch.float32" in linear(*args)
