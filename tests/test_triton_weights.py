"""Triton's products with weights of 8 bits: on a GPU, and interpreted without one."""

import os
import subprocess
import sys

import pytest
import torch

from wush_compile import formats
from wush_compile.ops import core as ops

pytest.importorskip("triton")
from wush_compile.kernels import dispatch
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear.choose import Hopper, Int8, Int8Gemv, choose_int8

gpu = pytest.mark.gpu
RULES = {"fp8": "token", "none": "none"}
KERNELS = {
    "gemv": (Int8Gemv(32, 256, 4), (1,)),
    "short gemv": (Int8Gemv(8, 1024, 4), (1,)),
    "gemm": (Int8(64, 16, 128, 4, 4), (3, 16, 17)),
    "wide gemm": (Int8(64, 64, 128, 4, 4), (33, 64, 65)),
    "hopper": (Hopper(128, 64, 2, 1, 6), (2, 64, 65, 200)),
    "split hopper": (Hopper(128, 128, 2, 3, 4), (17, 130)),
    "wide hopper": (Hopper(128, 192, 2, 1, 3), (150, 193)),
    "four warpgroups": (Hopper(256, 32, 4, 1, 5), (2, 33)),
    "library": ("bf16", (1, 65, 300)),
    "chosen": (None, (0, 1, 2, 3, 4, 5, 17, 64, 129)),
}


def operands(m: int, n: int, k: int, activation: str, dtype=torch.bfloat16, device="cuda"):
    """Codes and scales of an activation, of a weight, and a bias; a group of zeros among the weights."""
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    w = torch.randn(n, k, generator=generator) * torch.exp2(torch.randint(-6, 6, (n, 1), generator=generator))
    w[n // 2, :32] = 0
    q = ops.REFERENCE["transform_quantize"](x, None, None, activation, RULES[activation])
    bias = torch.randn(n, generator=generator).to(dtype)
    return [t.to(device) for t in (*q, *formats.quantize(w, "int8", "absmax"), bias)]


def exact(codes, scales, w, w_scales, activation, rounded):
    """The product in float64, and the sum of its terms' magnitudes. rounded: code · scale in the dtype of x."""
    x = formats.dequantize_fp8(codes, scales) if activation == "fp8" else codes.float()
    weight = formats.dequantize(w, w_scales, "int8")
    weight = weight.to(torch.bfloat16 if activation == "fp8" else codes.dtype) if rounded else weight
    return x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T


@gpu
@pytest.mark.parametrize("n, k", [(24, 64), (130, 576), (200, 384), (8200, 2048)])
@pytest.mark.parametrize("activation", RULES)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_gives_the_product(name, activation, n, k):
    kernel, rows = KERNELS[name]
    hopper = isinstance(kernel, Hopper)
    if hopper and (torch.cuda.get_device_capability() != (9, 0) or k % 128):
        pytest.skip("needs Hopper, and whole steps of 128 channels")
    for m in rows:
        for dtype in (torch.bfloat16, torch.float16) if activation == "none" and not hopper else (torch.bfloat16,):
            codes, scales, w, w_scales, bias = operands(m, n, k, activation, dtype)
            args = codes, scales, None, w, w_scales, None, bias

            def run(residual, out_dtype, kernel=kernel, args=args):
                more = dict(kernel=kernel, activation_format=activation)
                return triton_linear.fp4_linear(*args, residual, "int8", out_dtype, **more)

            got, taken = (
                run(None, torch.float32),
                kernel or (choose_int8(m, n, k) if m else None),
            )
            want, size = exact(codes, scales, w, w_scales, activation, not isinstance(taken, Int8Gemv))
            want += bias.double()
            assert got.shape == (m, n) and ((got.double() - want).abs() <= 1e-5 * size + 1e-6 * want.abs()).all(), m
            # One rounding to the dtype of the model, then the residual.
            residual = torch.randn(m, n, device="cuda").to(dtype)
            step = torch.finfo(dtype).eps
            wide, error = got.to(dtype) + residual, (run(residual, dtype).double() - got.double() - residual.double())
            assert (error.abs() <= step * (got.abs() + wide.abs()).double()).all(), (m, dtype)


@gpu
@pytest.mark.parametrize("rows", [1, 4, 17, 129])
def test_a_row_that_is_not_finite_stays_alone(rows):
    for activation in RULES:
        x = torch.randn(rows, 256, device="cuda").bfloat16()
        x[-1, 7] = float("nan")
        _, _, w, w_scales, bias = operands(1, 72, 256, activation)
        q = torch.ops.wush.transform_quantize(x, None, None, activation, RULES[activation])
        args = None, w, w_scales, None, bias, None, "int8", torch.bfloat16, "rows", activation
        y = torch.ops.wush.fp4_linear(*q, *args)
        assert y[-1].isnan().all() and y[:-1].isfinite().all()
        assert dispatch.chosen("fp4_linear", 0, (*q, *args)) == "triton"


@gpu
def test_a_cuda_graph_holds_the_product():
    codes, scales, w, w_scales, bias = operands(1, 8200, 2048, "none")
    args = codes, scales, None, w, w_scales, None, bias, None, "int8", torch.bfloat16, "rows", "none"
    want = torch.ops.wush.fp4_linear(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.ops.wush.fp4_linear(*args)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


INTERPRETED = """
import itertools
import torch, triton
import triton.language as tl
from wush_compile import formats
from wush_compile.kernels.triton.linear import int8

@triton.jit
def wide(word):
    a = (((word & 255) ^ 128) - 128).to(tl.float32)
    b = ((((word >> 8) & 255) ^ 128) - 128).to(tl.float32)
    c = ((((word >> 16) & 255) ^ 128) - 128).to(tl.float32)
    d = ((((word >> 24) & 255) ^ 128) - 128).to(tl.float32)
    return a, b, c, d

int8._wide = wide                       # the interpreter knows no assembly
torch.manual_seed(0)
SIZES = ((1, 24, 64, False), (1, 40, 576, True), (1, 33, 1024, False), (3, 70, 192, True), (18, 65, 96, False))
for (m, n, k, unit), scaled in itertools.product(SIZES, ("", "one", "rows")):
    gw = {"": None, "one": torch.tensor([1.37]), "rows": (1 + torch.rand(n)).bfloat16()}[scaled]
    x, bias, residual = torch.randn(m, k).half(), torch.randn(n), torch.randn(m, n)
    scale = torch.rand(m) + 0.5 if unit else None
    w, w_scales = formats.quantize(torch.randn(n, k), "int8", "absmax")
    weight = formats.dequantize(w, w_scales, "int8")
    out = torch.empty(m, n)
    if m == 1:
        grid = (triton.cdiv(n, 8),)
        words = x.view(torch.int64), scale, w.view(torch.int32)
        int8.int8_gemv_kernel[grid](
            *words, w_scales, gw, bias, residual, out, n, k, tl.float16, unit, scaled != "", True, True, 8, 256, False
        )
    else:
        grid = (triton.cdiv(m, 16) * triton.cdiv(n, 64),)
        args = x, scale, w.view(torch.int8), w_scales, gw, bias, residual, out
        int8.int8_gemm_kernel[grid](*args, m, n, k, unit, scaled != "", True, True, 64, 16, 128, 2, False)
        weight = weight.half().float()
    want = (x.float() @ weight.T) * (1 if scale is None else scale[:, None]) / (1 if gw is None else gw.float())
    want = want + bias + residual
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    up = torch.zeros(n, k, dtype=torch.float16)
    int8.int8_upcast_kernel[(triton.cdiv(n, 16), triton.cdiv(k, 128))](w.view(torch.int8), w_scales, up, n, k, 16, 128)
    torch.testing.assert_close(up, formats.dequantize(w, w_scales, "int8").half(), rtol=1e-3, atol=0)
print("same")
"""


def test_interpreted(tmp_path):
    """The same kernels without a GPU. In a process of its own, because Triton reads TRITON_INTERPRET at import."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "interpreted.py"  # Triton reads a kernel's source from its file
    script.write_text(INTERPRETED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-3000:]
