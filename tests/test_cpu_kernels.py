"""The CPU kernels of csrc/cpu at both levels of instructions: bits of codes and scales, products against float64."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wush_compile import errors, formats
from wush_compile.diagnostics.conformance import share_of_codes
from wush_compile.diagnostics.draw import feedback_limit, feedback_numbers, signed_permutations
from wush_compile.formats import FORMATS
from wush_compile.kernels import cpu, dispatch, libraries
from wush_compile.ops import core

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built for this machine")
WIDTHS = {"mxfp4": (32, 96, 576), "nvfp4": (16, 48, 80, 576)}
RULES = [(f, rule) for f in WIDTHS for rule in FORMATS[f].scale_rules]


def wide_range(rows: int, width: int, seed: int) -> torch.Tensor:
    """Values of many exponents [rows, width]: a zero group, small rows, NaN, Inf, and numbers at the ends of fp32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= torch.exp2(torch.randint(-140, 120, (rows, 1), generator=generator).float())
    x[0, :16] = 0
    for row, value in zip(range(1, rows), (float("nan"), float("inf"), 1e-45, 3e38)):
        x[row, row % width] = value
    return x


@pytest.mark.parametrize("format, rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_have_the_references_bits(format, rule, dtype):
    g = None if format == "mxfp4" and rule != "paper" else torch.tensor([3.7])
    for width in WIDTHS[format]:
        for rows in (0, 1, 3, 17, 129):
            x = wide_range(max(rows, 1), width, seed=rows)[:rows].to(dtype)
            found = cpu.transform_quantize(x, None, g, format, rule)
            wanted = core.REFERENCE["transform_quantize"](x, None, g, format, rule)
            assert all(map(torch.equal, found, wanted)), (width, rows)


@given(st.integers(0, 2**32 - 1), st.sampled_from(RULES))
def test_any_bits_are_quantized_as_by_the_reference(seed, case):
    format, rule = case
    bits = torch.randint(-(2**31), 2**31, (4, 96), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    x = bits.view(torch.float32)
    g = torch.tensor([1.3])
    found = cpu.transform_quantize(x, None, g, format, rule)
    assert all(map(torch.equal, found, core.REFERENCE["transform_quantize"](x, None, g, format, rule)))


@pytest.mark.parametrize("format", WIDTHS)
@pytest.mark.parametrize("block", [16, 32, 64])
def test_a_transform_of_integers_is_exact(format, block):
    """Sums of small integers are exact in any order. Blocks smaller and larger than a group; one block for all."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 17):
        x = torch.randint(-24, 25, (2, rows, 192), generator=generator).to(torch.bfloat16)[1]
        for blocks in (1, 192 // block):
            t = torch.randint(-3, 4, (blocks, block, block), generator=generator).to(torch.bfloat16)
            found = cpu.transform_quantize(x, t, None, format, "mse")
            assert all(map(torch.equal, found, core.REFERENCE["transform_quantize"](x, t, None, format, "mse")))


FEEDBACK_RULES = [(f, rule) for f, rule in RULES if rule != "paper"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantized(x, t, g, format, rule, f) -> torch.Tensor:
    return cpu.transform_quantize(x, t, g, format, rule, "rows", f)[0]


def same(x, t, g, format, rule, f) -> bool:
    args = (x, t, g, format, rule, "rows", f)
    return all(map(torch.equal, cpu.transform_quantize(*args), core.REFERENCE["transform_quantize"](*args)))


@pytest.mark.parametrize("format, rule", FEEDBACK_RULES)
@pytest.mark.parametrize("block", [None, 0, 64])  # no transform, the group's size, more
def test_feedback_of_exact_sums_has_the_references_bits(format, rule, block):
    """Rows that fill no vector, share their numbers with all other rows, or with none."""
    generator = torch.Generator().manual_seed(0)
    width, group, changed = 192, FORMATS[format].group_size, 0
    for rows in (0, 1, 3, 17, 129):
        for dtype in FLOATS:
            x = torch.randint(-24, 25, (rows, width), generator=generator).to(dtype)
            x[torch.rand(x.shape, generator=generator) < 0.1] *= -0.0
            f = feedback_numbers("eighths", format, width, generator)
            for blocks in (1,) if block is None else (1, width // (block or group)):
                size = block or group
                t = torch.randint(0, 2, (blocks, size, size), generator=generator) * 2 - 1
                args = (x, None if block is None else t.to(dtype), torch.tensor([0.5]) if rows % 2 else None)
                assert same(*args, format, rule, f), (rows, dtype, blocks)
                changed += int(
                    (cpu.transform_quantize(*args, format, rule)[0] != quantized(*args, format, rule, f)).sum()
                )
    assert changed > 10000


@pytest.mark.parametrize("format, rule", FEEDBACK_RULES)
def test_feedback_of_any_values(format, rule):
    """Real numbers and global scales; groups that are not finite, large or tiny. Scales are exact, and so are codes but
    where the last bit of a sum decides."""
    for g in (None, torch.tensor([0.37])):
        for rows, dtype in ((17, torch.float16), (129, torch.bfloat16), (129, torch.float32)):
            x = wide_range(rows, 576, seed=rows).to(dtype)
            generator = torch.Generator().manual_seed(rows)
            t = signed_permutations(576 // 64, 64, generator).to(dtype)
            args = (x, t, g, format, rule, "rows", feedback_numbers("any", format, 576, generator))
            found, wanted = cpu.transform_quantize(*args), core.REFERENCE["transform_quantize"](*args)
            assert share_of_codes(found, wanted) <= feedback_limit(rows, 576, format)


@pytest.mark.parametrize("format", WIDTHS)
def test_feedback_of_zeros_rounds_to_nearest(format):
    x = wide_range(129, 576, seed=0)
    zeros = feedback_numbers("zeros", format, 576, torch.Generator())
    for f in (zeros, -zeros):
        assert torch.equal(quantized(x, None, None, format, "mse", f), quantized(x, None, None, format, "mse", None))


@pytest.mark.parametrize("format", WIDTHS)
def test_large_groups_take_no_feedback(format):
    """From 2^100 on. The group's other half decides nothing: its neighbours keep theirs."""
    generator = torch.Generator().manual_seed(0)
    group = FORMATS[format].group_size
    x = torch.randint(-24, 25, (5, 4, group), generator=generator).float()
    x[:, 1] *= 2.0**98
    x[:, 1, 7], x[:, 2, 3], x[:, 3, 5] = -(2.0**100), float("nan"), float("inf")
    f = feedback_numbers("eighths", format, 4 * group, generator)
    x = x.flatten(1)
    g = None if format == "mxfp4" else torch.tensor([2.0**-99])
    nearest, found = (quantized(x, None, g, format, "mse", v).view(5, 4, -1) for v in (None, f))
    assert same(x, None, g, format, "mse", f)
    assert torch.equal(nearest[:, 1:], found[:, 1:]) and not found[:, 2:].any() and found[:, 1].any()
    x[:, group + 7] = 2.0**99
    assert not torch.equal(quantized(x, None, g, format, "mse", f).view(5, 4, -1)[:, 1], nearest[:, 1])


def test_feedback_reads_the_row_and_group_of_each_code():
    """Rows and groups one by one give what they give together."""
    generator = torch.Generator().manual_seed(0)
    for format, group in (("mxfp4", 32), ("nvfp4", 16)):
        x = torch.randint(-24, 25, (37, 5 * group), generator=generator).to(torch.bfloat16)
        f = feedback_numbers("eighths", format, 5 * group, generator)
        whole = quantized(x, None, None, format, "mse", f).view(37, 5, -1)
        for b in range(5):
            part = x[:, b * group : (b + 1) * group]
            assert torch.equal(quantized(part, None, None, format, "mse", f[b : b + 1]), whole[:, b])
            assert torch.equal(quantized(part[30:31], None, None, format, "mse", f[b : b + 1]), whole[30:31, b])


def product(rows: int, columns: int, width: int, format: str, activations: str, dtype: torch.dtype, seed: int = 0):
    """Arguments of `fp4_linear` without residual, and the product in float64 [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*s, generator=generator) for s in ((rows, width), (columns, width), (columns,)))
    g = torch.tensor([11.0]) if format == "nvfp4" and activations == "same" else None
    weight_g = torch.tensor([20.0]) if format == "nvfp4" else None
    weight = formats.quantize(w, format, "absmax" if format == "int8" else "mse", weight_g)
    operand, rule = {"same": (format, "mse"), "fp8": ("fp8", "token"), "none": ("none", "none")}[activations]
    codes, scales = core.REFERENCE["transform_quantize"](x.to(dtype), None, g, operand, rule)
    if activations == "same":
        wide = formats.dequantize(codes, scales, format, g)
    else:
        wide = formats.dequantize_fp8(codes, scales) if activations == "fp8" else codes
    exact = wide.double() @ formats.dequantize(*weight, format, weight_g).double().T + bias.to(dtype).double()
    return (codes, scales, g, *weight, weight_g, bias.to(dtype)), exact


CASES = [(f, a) for f in WIDTHS for a in ("same", "fp8", "none")] + [("int8", "fp8"), ("int8", "none")]


@pytest.mark.parametrize("format, activations", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(format, activations, dtype):
    """Rows for every kernel, columns that fill no tile, and a last half chunk of codes."""
    for width, columns in ((formats.get_format(format).group_size * 3, 5), (576, 70)):
        for rows in (0, 1, 2, 3, 4, 5, 17, 129):
            args, exact = product(rows, columns, width, format, activations, dtype)
            y = cpu.fp4_linear(*args, None, format, dtype, "rows", activations)
            assert y.dtype == dtype and y.shape == (rows, columns)
            # One rounding of fp32 sums, whose errors are bounded by the largest terms.
            step = torch.finfo(dtype).eps / 2
            assert torch.all((y.double() - exact).abs() <= step * exact.abs() + 2e-5), (width, rows)


def exact_product(rows: int, columns: int, activations: str, dtype: torch.dtype, generator: torch.Generator):
    """Arguments of `fp4_linear` up to the residual in MXFP4, with a factor of each row and sums that every order of
    fp32 additions gives exactly."""
    width = 96

    def codes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        bytes = torch.randint(256, (n, width // 2), generator=generator).to(torch.uint8)
        return bytes, torch.randint(126, 129, (n, width // 32), generator=generator).to(torch.uint8)

    values = torch.randint(-8, 9, (rows, width), generator=generator)
    operand = {
        "same": codes(rows),
        "fp8": (
            values.float().to(torch.float8_e4m3fn).view(torch.uint8),
            torch.exp2(torch.randint(-3, 4, (rows, 1), generator=generator).float()),
        ),
        "none": (values.to(dtype), torch.empty(rows, 0)),
    }[activations]
    factors = torch.exp2(4 * torch.randn(columns, generator=generator)).to(torch.bfloat16)
    bias, residual = (torch.randn(*s, generator=generator).to(dtype) for s in ((columns,), (rows, columns)))
    return *operand, None, *codes(columns), factors, bias, residual


@pytest.mark.parametrize("activations", ["same", "fp8", "none"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_factors_of_rows_have_the_references_bits(activations, dtype):
    """Rows for every kernel, and columns that fill no vector, no panel and no tile."""
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 3, 4, 5, 17, 129):
        for columns in (1, 3, 17, 129):
            codes, scales, _, *weight, bias, residual = exact_product(rows, columns, activations, dtype, generator)
            for g in (None, torch.tensor([3.0])):
                for own, other in ((None, None), (bias, None), (None, residual), (bias, residual)):
                    args = (codes, scales, g, *weight, own, other, "mxfp4", dtype, "rows", activations)
                    assert cpu.refuses_fp4_linear(*args) is None
                    assert torch.equal(cpu.fp4_linear(*args), core.REFERENCE["fp4_linear"](*args)), (rows, columns)


@pytest.mark.parametrize("rows", [3, 17])
def test_factors_of_rows_stay_in_their_columns(rows):
    """Each column is what a global scale of its factor makes of it; the factors need not be contiguous."""
    args = exact_product(rows, 37, "same", torch.bfloat16, torch.Generator().manual_seed(0))
    *operands, factors, bias, residual = args
    apart = torch.stack([factors, -factors], -1)[..., 0]
    assert not apart.is_contiguous()
    y = cpu.fp4_linear(*operands, apart, bias, residual, "mxfp4", torch.bfloat16)
    for n in range(37):
        one = cpu.fp4_linear(*operands, factors[n : n + 1].float(), bias, residual, "mxfp4", torch.bfloat16)
        assert torch.equal(y[:, n], one[:, n])
    assert len(set(factors.tolist())) > 30


def test_nan_stays_in_its_row_and_column():
    args, _ = product(9, 6, 80, "nvfp4", "same", torch.bfloat16)
    codes, scales, g, weight_codes, weight_scales, *rest = args
    scales[3, 1], weight_scales[5, 4] = formats.NV_NAN, formats.NV_NAN
    for rows in (slice(2, 5), slice(0, 9)):  # few rows, more rows
        y = cpu.fp4_linear(
            codes[rows], scales[rows], g, weight_codes, weight_scales, *rest, None, "nvfp4", torch.bfloat16
        )
        wanted = torch.zeros(9, 6, dtype=torch.bool)
        wanted[3], wanted[:, 5] = True, True
        assert torch.equal(y.isnan(), wanted[rows])


@pytest.mark.parametrize("format, activation", CASES[:-2])
@pytest.mark.parametrize("by_index", [False, True])
def test_experts_are_products_of_their_rows(format, activation, by_index):
    """Counts for both kernels, an expert without rows, rows of no expert."""
    counts, n, k = (1, 0, 20, 4), 24, 96
    tokens, rows = (11, 27) if by_index else (27, 27)
    torch.manual_seed(0)
    weights = [formats.quantize(torch.randn(n, k), format, "absmax") for _ in counts]
    codes, scales = (torch.stack(t) for t in zip(*weights))
    gw = torch.tensor([1.0, 2.0, 3.0, 4.0]) if format == "nvfp4" else None
    operand = activation if activation != "same" else format
    x = torch.randn(tokens, k).bfloat16()
    rule = "absmax" if activation == "same" else formats.ACTIVATION_FORMATS[activation].scale_rules[0]
    q = core.REFERENCE["transform_quantize"](x, None, None, operand, rule)
    index = torch.randint(tokens, (rows,)) if by_index else None
    bias, offs = torch.randn(4, n).bfloat16(), torch.tensor(counts).cumsum(0, dtype=torch.int32)
    args = (*q, None, codes, scales, gw, offs, bias, format, torch.bfloat16, "rows", activation, index)
    assert cpu.refuses_fp4_grouped_linear(*args) is None
    y, start = cpu.fp4_grouped_linear(*args), 0
    for e, count in enumerate(counts):
        mine = slice(start, start + count)
        some = [t[mine] if index is None else t[index[mine]] for t in q]
        g = None if gw is None else gw[e : e + 1]
        one = (*some, None, codes[e], scales[e], g, bias[e], None, format, torch.bfloat16, "rows", activation)
        assert torch.equal(y[mine], cpu.fp4_linear(*one))
        start += count
    assert not y[start:].any()
    with pytest.raises(errors.OffsetsError):
        torch.ops.wush.fp4_grouped_linear(*args[:6], offs.flip(0), *args[7:])


def test_feedback_need_not_be_contiguous():
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(9, 96, generator=generator), feedback_numbers("any", "mxfp4", 96, generator)
    apart = torch.stack([f, -f], -1)[..., 0]
    assert not apart.is_contiguous()
    args = (x, None, None, "mxfp4", "mse")
    assert torch.equal(quantized(*args, apart), quantized(*args, f))


def test_the_residual_is_added_after_the_rounding():
    args, _ = product(7, 12, 96, "mxfp4", "same", torch.bfloat16)
    residual = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    y = cpu.fp4_linear(*args, None, "mxfp4", torch.bfloat16)
    assert torch.equal(cpu.fp4_linear(*args, residual, "mxfp4", torch.bfloat16), y + residual)


def test_the_ops_use_them(monkeypatch):
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    table = dispatch.resolve.__wrapped__(None)
    assert [name for name, _ in table["fp4_linear"]] == [name for name, _ in table["fp4_grouped_linear"]] == ["cpu"]
    monkeypatch.setenv("WUSH_PROVIDER", "reference")
    assert dispatch.resolve.__wrapped__(None) == {}


def test_arguments_at_fault_reach_no_kernel():
    """The reference says what is wrong with a call of the op; the provider checks all that its kernels read."""
    args, _ = product(3, 5, 64, "mxfp4", "same", torch.bfloat16)
    codes, scales, g, weight_codes, weight_scales, _, bias = args
    fp4_linear, end = torch.ops.wush.fp4_linear, ("mxfp4", torch.bfloat16)
    with pytest.raises(RuntimeError):
        fp4_linear(codes, scales, g, weight_codes[:, :16], weight_scales, None, bias, None, *end)
    for bad in (weight_scales[:, :1], weight_scales[:4], weight_scales.int()):
        with pytest.raises(ValueError, match="its scale is torch"):
            cpu.fp4_linear(codes, scales, g, weight_codes, bad, None, bias, None, *end)
    with pytest.raises(ValueError, match="the activation is"):
        cpu.fp4_linear(codes[:, :16], scales[:, :1], g, weight_codes, weight_scales, None, bias, None, *end)
    with pytest.raises(ValueError, match="the bias is"):
        cpu.fp4_linear(codes, scales, g, weight_codes, weight_scales, None, bias[:4], None, *end)
    with pytest.raises(ValueError, match="the residual is"):
        cpu.fp4_linear(codes, scales, g, weight_codes, weight_scales, None, bias, bias, *end)
    for bad in (torch.ones(1), torch.ones(4), torch.ones(5, 1)):
        with pytest.raises(ValueError, match="the global scale of its rows is"):
            cpu.fp4_linear(codes, scales, g, weight_codes, weight_scales, bad.bfloat16(), bias, None, *end)
    with pytest.raises(ValueError, match="do not cover"):
        cpu.transform_quantize(torch.randn(2, 96), torch.randn(2, 32, 32), None, "mxfp4", "mse")
    x, f = torch.randn(2, 96), torch.zeros(3, 6, 8, dtype=torch.bfloat16)
    for bad in (f.float(), f[:2], f[..., :4], torch.zeros(6, 6, 4, dtype=torch.bfloat16), f.flatten(1), f.to("meta")):
        with pytest.raises(ValueError, match="feedback is torch"):
            cpu.transform_quantize(x, None, None, "mxfp4", "mse", "rows", bad)
    with pytest.raises(ValueError, match="takes no feedback"):
        cpu.transform_quantize(x, None, None, "mxfp4", "paper", "rows", f)
    with pytest.raises(ValueError, match="no scale rule 'ocp'"):
        cpu.transform_quantize(torch.randn(2, 96), None, None, "nvfp4", "ocp")


def test_the_lesser_level_runs_the_same_tests():
    """On a CPU with AVX-512 the AVX2 kernels are tested in a process that is told to use them."""
    if os.environ.get("WUSH_CPU_LEVEL"):
        pytest.skip("this is that process")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"WUSH_CPU_LEVEL": "avx2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "DIRECTORIES", (tmp_path,))
    assert cpu.unavailable.__wrapped__().startswith("not built: `python csrc/build.py --targets cpu`")
    (tmp_path / "libwush_cpu.so").write_bytes(b"no library")
    libraries.load.cache_clear()
    try:
        assert cpu.unavailable.__wrapped__().startswith("libwush_cpu.so does not run here:")
    finally:
        libraries.load.cache_clear()


def test_a_library_of_older_sources_is_not_loaded(monkeypatch, tmp_path):
    """An older library reads the same arguments as something else."""
    monkeypatch.setattr(libraries, "DIRECTORIES", (tmp_path,))
    (tmp_path / "libwush_cpu.so").write_bytes(b"never read")
    (tmp_path / "libwush_cpu.sources").write_text("0" * 64)
    libraries.load.cache_clear()
    try:
        assert "csrc has changed since: build it again" in cpu.unavailable.__wrapped__()
    finally:
        libraries.load.cache_clear()
