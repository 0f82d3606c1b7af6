"""`wush::fp4_linear` with a factor of each weight row, bf16 [N], in the kernels of GPUs (docs/spec.md §6)."""

import os
import subprocess
import sys

import pytest
import torch
from test_triton_linear import CASES, DEVICE, both, error, exact, gpu, operands, scalar

from wush_compile import formats
from wush_compile.kernels import cuda, scaled_mm
from wush_compile.kernels.triton.common.memory import is_power_of_two
from wush_compile.kernels.triton.grouped import fp4_grouped_linear as triton_grouped
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear import library
from wush_compile.kernels.triton.linear.choose import Fused, Hopper
from wush_compile.kernels.triton.linear.operands import Operands, check
from wush_compile.kernels.triton.packaged import library as packaged
from wush_compile.kernels.triton.packaged.linear import Call
from wush_compile.ops import core as ops

SIZES = [(1, 201, 1024), (2, 129, 512), (3, 77, 512), (33, 265, 1024), (133, 513, 1024), (301, 1041, 1024)]


def rows_of(n):
    """Factors in [1, 2), as weights have them, and one far from it."""
    g = (1 + torch.rand(n, device=DEVICE)).bfloat16()
    g[n // 2] = 2.0**-20
    return g


def fits(kernel, k):
    return not isinstance(kernel, Fused) or k % (kernel.block_k * kernel.split_k) == 0


@gpu
@pytest.mark.parametrize("format, kernel", CASES, ids=str)
@pytest.mark.parametrize("m, n, k", SIZES)
def test_each_column_is_divided_by_its_rows_factor(format, kernel, m, n, k):
    """In fp32 the very sums of the product without factors, times the rounded inverse. With all that can be added,
    one rounding of the product and one of the residual's sum."""
    if not fits(kernel, k) or kernel == "library" or (kernel is None and format == "nvfp4"):
        return  # what is chosen for NVFP4 depends on its global scale
    c, s, wc, ws = operands(format, m, n, k)
    g, gx = rows_of(n), scalar(0.37)
    plain = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.float32, kernel)
    got = triton_linear.fp4_linear(c, s, None, wc, ws, g, None, None, format, torch.float32, kernel)
    assert torch.equal(got, plain * (1.0 / g.float()))
    bias, residual = torch.randn(n, device=DEVICE).bfloat16(), torch.randn(m, n, device=DEVICE).bfloat16()
    got = triton_linear.fp4_linear(c, s, gx, wc, ws, g, bias, None, format, torch.float32, kernel)
    # Where gx is part of x's units it changes how terms round, which cancellation makes visible.
    alone = triton_linear.fp4_linear(c, s, gx, wc, ws, None, None, None, format, torch.float32, kernel) / g.double()
    want, rest = alone + bias.double(), 1e-6 * (alone.abs() + bias.double().abs())
    assert ((got - want).abs() <= rest).all()
    got = triton_linear.fp4_linear(c, s, gx, wc, ws, g, bias, residual, format, torch.bfloat16, kernel)
    total = want + residual.double()
    assert ((got.double() - total).abs() <= 2.0**-8 * (want.abs() + total.abs()) + rest).all()


@gpu
@pytest.mark.parametrize("format, kernel", CASES, ids=str)
def test_equal_factors_are_one_scale(format, kernel):
    """The same bits: factors that are all g, and one global scale g."""
    m, n, k = 133, 528, 1024
    c, s, wc, ws = operands(format, m, n, k)
    residual = torch.randn(m, n, device=DEVICE).bfloat16()
    g = torch.full((n,), 1.3828125, dtype=torch.bfloat16, device=DEVICE)
    got, want = (
        triton_linear.fp4_linear(c, s, scalar(0.37), wc, ws, gw, None, residual, format, torch.bfloat16, kernel)
        for gw in (g, g[:1].float())
    )
    assert torch.equal(got, want)


@gpu
@pytest.mark.parametrize("activation", ["same", "fp8"])
@pytest.mark.parametrize("sliced", [False, True])
def test_factors_go_into_the_units_of_the_librarys_rows(activation, sliced, monkeypatch):
    """Also where a weight goes to the library in slices: each has its own factors."""
    if sliced:
        monkeypatch.setattr(library, "SCRATCH_BYTES", 1)
    m, n, k = 300, 592, 1024
    c, s, wc, ws = operands("mxfp4", m, n, k)
    if activation == "fp8":
        c, s = formats.quantize_fp8(torch.randn(m, k, device=DEVICE))
    x = formats.dequantize_fp8(c, s) if activation == "fp8" else formats.dequantize(c, s, "mxfp4")
    g = rows_of(n)
    plain = x.double() @ formats.dequantize(wc, ws, "mxfp4").double().T
    got = triton_linear.fp4_linear(
        c, s, None, wc, ws, g, None, None, "mxfp4", torch.bfloat16, "library", activation_format=activation
    )
    assert error(got.double() * g.double(), plain) < ops.PRODUCT_ERROR[torch.bfloat16]


@gpu
@both
def test_slices_of_a_weight_have_their_own_factors(format, monkeypatch):
    m, n, k = 70, 601, 576
    c, s, wc, ws = operands(format, m, n, k)
    g, bias = rows_of(n), torch.randn(n, device=DEVICE)
    call = c, s, None, wc, ws, g, bias, None, format, torch.float32, "bf16"
    whole = triton_linear.fp4_linear(*call)
    monkeypatch.setattr(library, "SCRATCH_BYTES", 1)
    got = triton_linear.fp4_linear(*call)
    magnitude = exact(c, s, wc, ws, format).abs().amax() / g.double() + bias.double().abs()
    assert ((got.double() - whole.double()).abs() <= 1e-5 * magnitude).all()  # cuBLAS may sum in another order


@gpu
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4", "int8"])
@pytest.mark.parametrize("activation", ["fp8", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 7, 65, 301])
def test_activations_of_8_and_16_bits(format, activation, dtype, m):
    """Every kernel that is chosen there, with the sums that it has without factors."""
    n, k = 265, 1024
    x = torch.randn(m, k, device=DEVICE, dtype=dtype)
    c, s = ops._transform_quantize(x, None, None, activation, formats.ACTIVATION_FORMATS[activation].scale_rules[0])
    w = formats.quantize(torch.randn(n, k, device=DEVICE), format, "absmax")
    g = rows_of(n)
    got, plain = (
        triton_linear.fp4_linear(
            c, s, None, *w, gw, None, None, format, torch.float32, None, activation_format=activation
        )
        for gw in (g, None)
    )
    assert torch.equal(got, plain * (1.0 / g.float()))


@gpu
@pytest.mark.parametrize("kernel", ["bf16", Fused(64, 64, 128, 2, 4, 4, False), Hopper(128, 64, 2, 2, 7)], ids=str)
@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_kernels_that_decode_only_the_weight(kernel, activation):
    m, n, k = 65, 265, 1024
    x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    c, s = ops._transform_quantize(x, None, None, activation, formats.ACTIVATION_FORMATS[activation].scale_rules[0])
    w, g = formats.quantize(torch.randn(n, k, device=DEVICE), "mxfp4", "absmax"), rows_of(n)
    got, plain = (
        triton_linear.fp4_linear(
            c, s, None, *w, gw, None, None, "mxfp4", torch.float32, kernel, activation_format=activation
        )
        for gw in (g, None)
    )
    assert torch.equal(got, plain * (1.0 / g.float()))


@gpu
@pytest.mark.parametrize("m, n, k", [(1, 201, 1024), (17, 265, 96), (70, 513, 2048)])
def test_int4(m, n, k):
    q, v = (formats.quantize(torch.randn(rows, k, device=DEVICE), "int4", "mse") for rows in (m, n))
    g = rows_of(n)
    got, plain = (triton_linear.fp4_linear(*q, None, *v, gw, None, None, "int4", torch.float32) for gw in (g, None))
    assert torch.equal(got, plain * (1.0 / g.float()))


@gpu
@both
@pytest.mark.parametrize("m", [1, 5, 64, 300])
def test_the_op_by_whichever_provider(format, m):
    """Any strides of the factors; those of csrc and of the library's scaled product refuse, and the next one runs."""
    c, s, wc, ws = operands(format, m, 256, 1024)
    g = rows_of(512)[::2]
    got = torch.ops.wush.fp4_linear(c, s, None, wc, ws, g, None, None, format, torch.float32)
    assert error(got.double() * g.double(), exact(c, s, wc, ws, format)) < 5e-4


@both
def test_wrong_factors_are_errors(format):
    fmt = formats.FORMATS[format]
    weight = torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 128 // fmt.group_size, dtype=torch.uint8)
    x = torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 128 // fmt.group_size, dtype=torch.uint8)

    def call(g):
        check(Operands(*x, None, *weight, g, None, None, format), torch.bfloat16)

    call(torch.ones(8).bfloat16())
    for bad in (torch.ones(7).bfloat16(), torch.ones(1).bfloat16(), torch.ones(8)):
        with pytest.raises(ValueError, match="weight_global_scale has shape"):
            call(bad)
    with pytest.raises(ValueError, match="weight_global_scale is torch.float16"):
        call(torch.ones(1).half())


def test_experts_have_one_scale_each():
    x = torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 4, dtype=torch.uint8)
    weight = torch.zeros(2, 8, 64, dtype=torch.uint8), torch.ones(2, 8, 4, dtype=torch.uint8)
    offs = torch.tensor([1, 3], dtype=torch.int32)
    for bad, message in ((torch.ones(2).bfloat16(), "is torch.bfloat16"), (torch.ones(2, 8).bfloat16(), "has shape")):
        o = triton_grouped.Operands(*x, None, *weight, bad, offs, None, None, "mxfp4", "same", False)
        with pytest.raises(ValueError, match=f"weight_global_scale {message}"):
            triton_grouped.check(o)


def test_one_scale_alone_goes_to_blackwells_other_products(monkeypatch):
    monkeypatch.setattr(cuda, "_target", lambda t: "sm_100a")
    monkeypatch.setattr(scaled_mm, "problem", lambda *args: None)
    codes, scales = torch.zeros(64, 64, dtype=torch.uint8), torch.zeros(64, 8, dtype=torch.uint8)
    for module in (cuda, scaled_mm):
        for g, refused in ((torch.ones(64).bfloat16(), True), (torch.ones(1), False)):
            reason = module.refuses_fp4_linear(
                codes, scales, None, codes, scales, g, None, None, "nvfp4", torch.bfloat16
            )
            assert ("a factor of each row" in reason) if refused else reason is None


def test_factors_are_no_power_of_two():
    """So they never go into the library's bf16 operands."""
    assert not is_power_of_two(torch.full((3,), 2.0, dtype=torch.bfloat16))
    assert not is_power_of_two(torch.full((1,), 2.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("gx", [None, 0.37])
@pytest.mark.parametrize("added", [False, True])
def test_the_librarys_epilogue_is_the_references(gx, added):
    """That of packages, of the same sums."""
    m, n, k = 5, 19, 64
    x, w = (formats.quantize(torch.randn(rows, k), "mxfp4", "absmax") for rows in (m, n))
    gx, gw = None if gx is None else torch.tensor([gx]), (1 + torch.rand(n)).bfloat16()
    bias, residual = (torch.randn(n).bfloat16(), torch.randn(m, n).bfloat16()) if added else (None, None)
    want = ops._fp4_linear(*x, gx, *w, gw, bias, residual, "mxfp4", torch.bfloat16)
    y = ops._fp4_linear(*x, None, *w, None, None, None, "mxfp4", torch.float32)
    fields = dict.fromkeys(Call._fields) | dict(gx=gx, gw=gw, bias=bias, residual=residual, out_dtype=torch.bfloat16)
    assert torch.equal(packaged._finish(y, Call(**fields), False), want)


INTERPRETED = """
import itertools
import torch, triton
import triton.language as tl
from wush_compile import formats
from wush_compile.kernels.triton.linear import gemv, library, upcast
from wush_compile.kernels.triton.linear.int4 import int4_gemm_kernel
from wush_compile.ops.core import REFERENCE

# The interpreter knows no assembly.
@triton.jit
def integer(code):
    m = code & 7
    v = tl.where(m < 4, m, (2 + (m & 1)) << tl.maximum((m >> 1) - 1, 0))
    return tl.where(code & 8 != 0, -v, v)

@triton.jit
def dot8(w, w1, w2, w3, x, x1):
    total = tl.zeros_like(w)
    for i in tl.static_range(8):
        total += integer((w >> (4 * i)) & 15) * integer((x >> (4 * i)) & 15)
    return total

@triton.jit
def four(w):
    return w, w, w, w

@triton.jit
def two(x):
    return x, x

@triton.jit
def look_up(w, low, high):
    return w, w

gemv._dot8, gemv.weight_bytes, gemv._activation_bytes, upcast._look_up = dot8, four, two, look_up

torch.manual_seed(0)
given = lambda *tensors: [t is not None for t in tensors]
factors = lambda n: (1 + torch.rand(n)).bfloat16()

options = lambda *tensors: itertools.product(*((None, t) for t in tensors))
m, n = 5, 521
y, ones = torch.randn(m, n), torch.ones(m, 1)
gx, one, rows, bias, residual = torch.tensor([0.37]), torch.tensor([1.7]), factors(n), torch.randn(n), torch.randn(m, n)
for (unit, gx, b, r), gw in itertools.product(options(torch.rand(m, 1), gx, bias, residual), (None, one, rows)):
    o = library.Operands(ones, ones, gx, ones, ones, gw, b, r, "mxfp4")
    out = library.finish_sums(y, unit, o, torch.float32)
    want = y if unit is None else y * unit
    scales = [g.float() for g in (gx, gw) if g is not None]
    if scales:
        want = want * (1 / (scales[0] * scales[1] if len(scales) == 2 else scales[0]))
    want = want if b is None else want + b
    assert torch.equal(out, want if r is None else want + r)
    print("finish")

for (m, n, k), format in itertools.product(((1, 13, 576), (2, 21, 128), (4, 9, 512)), ("mxfp4", "nvfp4")):
    q, v = formats.quantize(torch.randn(m, k), format, "absmax"), formats.quantize(torch.randn(n, k), format, "absmax")
    gx, gw, bias, residual = torch.tensor([0.37]), factors(n), torch.randn(n), torch.randn(m, n)
    for gx, gw, bias, residual in ((None, gw, None, None), (gx, gw, bias, residual)):
        out = torch.zeros(m, n)
        operands = q[0].view(torch.int32), q[1], gx, v[0].view(torch.int32), v[1], gw, bias, residual, out
        gemv.gemv_kernel[(triton.cdiv(n, 8),)](
            *operands, n, k, m, format, *given(gx, gw, bias, residual), 8, 256, False
        )
        want = REFERENCE["fp4_linear"](*q, gx, *v, gw, bias, residual, format, torch.float32)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
        print("gemv")

for m, n, k in ((3, 71, 96), (17, 63, 64)):
    q, v = formats.quantize(torch.randn(m, k), "int4", "mse"), formats.quantize(torch.randn(n, k), "int4", "gaussian")
    gw, bias, residual, out = factors(n), torch.randn(n), torch.randn(m, n), torch.zeros(m, n)
    grid = (-(-m // 16) * -(-n // 64),)
    int4_gemm_kernel[grid](
        *q, None, *v, gw, bias, residual, out, m, n, k, False, True, True, True, 64, 16, 2, False
    )
    want = REFERENCE["fp4_linear"](*q, None, *v, gw, bias, residual, "int4", torch.float32)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-4)
    print("int4")

for (m, n, k), gx in itertools.product(((3, 5, 256), (2, 7, 576)), (None, torch.tensor([4.0]))):
    q, v = (formats.quantize(torch.randn(rows, k), "mxfp4", "absmax") for rows in (m, n))
    gw, groups = factors(n), triton.next_power_of_2(k // 32)
    units = []
    for g in (None, gw):
        x_unit, w_unit = torch.zeros(m), torch.zeros(n)
        x, w = torch.zeros(m, k // 4, dtype=torch.int32), torch.zeros(n, k // 4, dtype=torch.int32)
        upcast.upcast_both_kernel[(m + n,)](
            q[0].view(torch.int32), q[1], gx, x_unit, x, v[0].view(torch.int32), v[1], g, w_unit, w, m, k, groups,
            gx is not None, g is not None, groups, False,
        )
        units.append((x_unit, w_unit))
    assert torch.equal(units[1][0], units[0][0])
    assert torch.equal(units[1][1], units[0][1] * (1 / gw.float()))
    print("upcast")
"""


def test_interpreted(tmp_path):
    """Kernels under Triton's interpreter, without a GPU. In a process of its own, because Triton reads TRITON_INTERPRET
    at import."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "interpreted.py"  # Triton reads a kernel's source from its file
    script.write_text(INTERPRETED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [run.stdout.count(name) for name in ("finish", "gemv", "int4", "upcast")] == [48, 12, 2, 4]
