"""Norms and activations inside the quantizer's kernel, against the ops of PyTorch that they replace, on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from wush_compile import formats
from wush_compile.ops import core as ops
from wush_compile.ops import fused as fused_ops

triton = pytest.importorskip("triton")
import triton.language as tl

from wush_compile.kernels.triton.quantize import fused as triton_fused
from wush_compile.kernels.triton.quantize import prologue as triton_prologue
from wush_compile.kernels.triton.quantize import tiles

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
CASES = [("mxfp4", "mse", 32), ("nvfp4", "absmax", 16), ("mxfp4", "absmax", 0)]
cases = pytest.mark.parametrize("format, rule, block", CASES)
shapes = pytest.mark.parametrize("m, k", [(1, 512), (37, 576), (130, 1536), (1100, 2048)])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@triton.jit
def activation_kernel(x, up, out, n, KIND: tl.constexpr, SIZE: tl.constexpr, SM: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = i < n
    value = tl.load(x + i, mask=there)
    if up is None:
        value = triton_prologue.activated(value, KIND, SM)
    else:
        value = triton_prologue.gated(value, tl.load(up + i, mask=there), KIND, SM)
    tl.store(out + i, value, mask=there)


@dtypes
@pytest.mark.parametrize("kind", fused_ops.ACTIVATIONS)
@pytest.mark.parametrize("factor", [None, 1.0, -1.6875])
def test_activations_for_every_value(kind, dtype, factor):
    """All 65536 values of a 16-bit float: the same bits as PyTorch's own kernels, NaN and Inf included; but for erf.
    Without a factor there is no gate."""
    gate = torch.arange(2**16, dtype=torch.int32, device=DEVICE).to(torch.int16).view(dtype)
    up = None if factor is None else torch.full_like(gate, factor)
    out = torch.empty_like(gate)
    sm = tiles.device_instructions(gate.device.index)
    activation_kernel[(64,)](gate, up, out, gate.numel(), kind, 1024, sm, enable_fp_fusion=False)
    want = fused_ops.ACTIVATIONS[kind](gate)
    if up is not None:
        want = want * up
    same = (out.view(torch.int16) == want.view(torch.int16)) | (out.isnan() & want.isnan())
    if kind == "gelu":
        # erf's last bit is not the same in every release of CUDA's library, and Triton brings its own: 10 values in
        # bf16 and 151 in fp16, all on the negative tail, where 1 + erf cancels.
        assert (~same).sum() <= 200 and torch.allclose(out[~same], want[~same], rtol=2**-7, atol=1e-6)
    else:
        assert same.all(), (gate[~same][:8].tolist(), out[~same][:8].tolist(), want[~same][:8].tolist())


def transform(k, block, dtype):
    return torch.linalg.qr(torch.randn(k // block, block, block, device=DEVICE))[0].to(dtype) if block else None


def differing(got, want):
    """Share of the codes and of the scales that differ."""
    return [(a != b).float().mean().item() for a, b in zip(got, want, strict=True)]


def with_scales_at_ties(got, want, x, t, format):
    """`got` with those groups of `want` whose two scales leave the same squared error, up to the rounding of an fp32
    sum: with the least-squares rule both are right. At most 2 of 10 000."""
    group = formats.FORMATS[format].group_size
    other = got[1] != want[1]  # [m, k / group]
    assert other.float().mean() <= 2e-4, other.sum()
    y = torch.einsum("mbk,bnk->mbn", x.double().view(len(x), *t.shape[:2]), t.double()).reshape(x.shape)
    errors = [
        (formats.dequantize(*q, format).double() - y).square().view(len(x), -1, group).sum(-1)[other]
        for q in (got, want)
    ]
    torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
    return torch.where(other.repeat_interleave(group // 2, 1), want[0], got[0]), torch.where(other, want[1], got[1])


@cases
@dtypes
@shapes
def test_activations(format, rule, block, dtype, m, k):
    """Bit for bit without a transform; with one an fp32 sum has another order, which shows at ties alone. gate and up
    are halves of one product, as after a merged linear."""
    both = (torch.randn(m, 2 * k, device=DEVICE) * 2).to(dtype)
    gate, up = both[:, :k], both[:, k:]
    t = transform(k, block, dtype)
    gelu_mul = triton_fused.gelu_mul_transform_quantize
    plain = triton_fused.activation_transform_quantize
    for run, activation, other in (
        (lambda *a: triton_fused.silu_mul_transform_quantize(gate, up, *a), "silu", up),
        (lambda *a: gelu_mul(gate, up, "none", *a), "gelu", up),
        (lambda *a: gelu_mul(gate, up, "tanh", *a), "gelu_tanh", up),
        *((lambda *a, kind=kind: plain(gate, kind, *a), kind, None) for kind in fused_ops.ACTIVATIONS),
        (lambda *a: triton_fused.swiglu_oai_transform_quantize(2 * both, 7.0, *a), "swiglu_oai", None),
    ):
        got = run(t, None, format, rule)
        clamped = activation == "swiglu_oai"
        x = fused_ops.swiglu_oai(2 * both, 7.0) if clamped else fused_ops.ACTIVATIONS[activation](gate)
        if other is not None:
            x = x * other
        want = ops._transform_quantize(x, t, None, format, rule)
        if rule == "mse" and not torch.equal(got[1], want[1]):
            got = with_scales_at_ties(got, want, x, t, format)
        assert max(differing(got, want)) <= (2e-5 if block else 1e-5), (activation, differing(got, want))


@cases
@dtypes
@shapes
@pytest.mark.parametrize("gain", fused_ops.GAINS)
def test_rms_norm(format, rule, block, dtype, m, k, gain):
    """The sum of squares has another order than PyTorch's: the scale's last bit, and so the rounding of few values, may
    differ. On rows whose squares add up exactly there is no order, and nothing differs."""
    t = transform(k, block, dtype)
    weight = None if gain == "none" else (1 + 0.1 * torch.randn(k, device=DEVICE)).to(dtype)
    eps = torch.tensor(1e-5, device=DEVICE)
    whole = torch.randint(-12, 13, (m, k), device=DEVICE).to(dtype)
    for x, share in ((whole, 0), (torch.randn(m, k, device=DEVICE).to(dtype), 2e-3)):
        for arguments in [(1e-5, None)] + [(0.0, eps)] * (gain == "rounded"):
            got = triton_fused.rms_norm_transform_quantize(x, weight, *arguments, gain, t, None, format, rule)
            want = ops._transform_quantize(fused_ops.rms_norm(x, weight, 1e-5, gain), t, None, format, rule)
            assert max(differing(got, want)) <= share + (2e-5 if block else 0), differing(got, want)


@cases
@dtypes
@shapes
@pytest.mark.parametrize("vectors", ["", "weight", "weight bias"])
def test_layer_norm(format, rule, block, dtype, m, k, vectors):
    """Mean and variance have orders of their own."""
    t = transform(k, block, dtype)
    weight = (1 + 0.1 * torch.randn(k, device=DEVICE)).to(dtype) if "weight" in vectors else None
    bias = torch.randn(k, device=DEVICE).to(dtype) if "bias" in vectors else None
    x = (3 + torch.randn(m, k, device=DEVICE)).to(dtype)
    got = triton_fused.layer_norm_transform_quantize(x, weight, bias, 1e-5, None, t, None, format, rule)
    want = ops._transform_quantize(F.layer_norm(x, (k,), weight, bias, 1e-5), t, None, format, rule)
    assert max(differing(got, want)) <= 1e-2, differing(got, want)


@cases
@dtypes
@shapes
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_a_norm_that_is_kept(format, rule, block, dtype, m, k, norm):
    """The codes are those of the op that keeps nothing, and without a transform they are those of the kept norm. It has
    the bits of PyTorch's where its sums do."""
    t = transform(k, block, dtype)
    weight = (1 + 0.1 * torch.randn(k, device=DEVICE)).to(dtype)
    x = torch.randint(-12, 13, (m, k), device=DEVICE).to(dtype)
    if norm == "rms_norm":
        arguments, want = (x, weight, 1e-5, None, "rounded"), fused_ops.rms_norm(x, weight, 1e-5, "rounded")
    else:
        bias = torch.randn(k, device=DEVICE).to(dtype)
        arguments, want = (x, weight, bias, 1e-5, None), F.layer_norm(x, (k,), weight, bias, 1e-5)
    tail = (t, None, format, rule)
    *got, kept = getattr(triton_fused, f"{norm}_keep_transform_quantize")(*arguments, *tail)
    alone = getattr(triton_fused, f"{norm}_transform_quantize")(*arguments, *tail)
    assert all(torch.equal(a, b) for a, b in zip(got, alone))
    if t is None:
        assert max(differing(got, ops._transform_quantize(kept, *tail))) == 0
    if norm == "rms_norm":
        assert torch.equal(kept, want)
    else:
        torch.testing.assert_close(kept, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_rows_of_nan_stay_alone():
    x = torch.randn(70, 512, device=DEVICE).bfloat16()
    clean = x.clone()
    x[5, 7] = float("nan")
    x[66, 500] = float("inf")
    arguments = (None, 1e-6, None, "none", transform(512, 32, torch.bfloat16), None, "mxfp4", "mse")
    got, want = (triton_fused.rms_norm_transform_quantize(rows, *arguments) for rows in (x, clean))
    others = torch.ones(70, dtype=torch.bool, device=DEVICE)
    others[[5, 66]] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, want)) and (got[1][5] == 0xFF).all()
