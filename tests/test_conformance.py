"""The conformance suite itself: green for the reference, red for a wrong implementation."""

import itertools
import json
import types

import pytest
import torch
from typer.testing import CliRunner

from wush_compile import feedback
from wush_compile.cli import app
from wush_compile.diagnostics import conformance, deep, fuzz, timing
from wush_compile.diagnostics.timing import Time
from wush_compile.formats import FORMATS
from wush_compile.kernels.provider import Implementation
from wush_compile.ops import core as ops
from wush_compile.ops import fused as fused_ops
from wush_compile.ops.schema import bind

CPU = torch.device("cpu")
GROUPS = {name: format.group_size for name, format in FORMATS.items()}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(conformance, "SHAPES", ((3, 96), (37, 160)))
    monkeypatch.setattr(conformance, "PRODUCTS", ((2, 24, 96), (17, 40, 160)))


def failures(op, run, refuses=lambda *args: None):
    return [r for r in conformance.check("mine", op, Implementation(run, refuses), CPU) if not r.ok]


@pytest.mark.parametrize("op", ["transform_quantize", "fp4_linear"])
def test_the_reference_conforms(op):
    assert failures(op, ops.REFERENCE[op]) == []


def wrong_last_row(*args):
    codes, scales = ops._transform_quantize(*args)
    codes[-1, -1] ^= 1
    return codes, scales


def forgets_a_byte(*args):
    """Like a kernel that does not write the last scale."""
    codes, scales = ops._transform_quantize(*args)
    if scales.dtype == torch.uint8:
        scales.view(-1)[-1] = conformance.POISON
    return codes, scales


def ignores_the_rule(x, transform, g, format, rule, *layout):
    return ops._transform_quantize(x, transform, g, format, "absmax", *layout)


def ignores_the_layout(x, transform, g, format, rule, layout="rows", feedback=None):
    return ops._transform_quantize(x, transform, g, format, rule, feedback=feedback)


def writes_no_padding(*args):
    """Like a kernel that does not write the padding of swizzled scales."""
    codes, scales = ops._transform_quantize(*args)
    if args[5] == "swizzled" and scales.dtype == torch.uint8:
        scales[-1, -1, -1, -1] = conformance.POISON
    return codes, scales


def one_matrix_for_all(x, transform, g, format, rule, *layout):
    return ops._transform_quantize(x, None if transform is None else transform[:1], g, format, rule, *layout)


def ignores_feedback(*args):
    return ops._transform_quantize(*args[:6])


def takes_the_next_groups_feedback(*args):
    return ops._transform_quantize(*args[:6], None if args[6] is None else args[6].roll(1, 0))


def swaps_steps(*args):
    """The numbers of steps 0 and 2, and of steps 1 and 2, in each other's place."""
    return ops._transform_quantize(*args[:6], None if args[6] is None else args[6][:, [0, 2, 1, 3, 4, 5]])


def keeps_wide_errors(*args):
    """Errors that are not rounded to bf16."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "torch", types.SimpleNamespace(**vars(torch) | {"bfloat16": torch.float32}))
        return ops._transform_quantize(*args)


def raises(*args):
    raise RuntimeError("no kernel image\nmore")


QUANTIZERS = [
    wrong_last_row,
    forgets_a_byte,
    ignores_the_rule,
    ignores_the_layout,
    writes_no_padding,
    one_matrix_for_all,
    ignores_feedback,
    takes_the_next_groups_feedback,
    swaps_steps,
    keeps_wide_errors,
    raises,
]


@pytest.mark.parametrize("broken", QUANTIZERS)
def test_a_wrong_quantizer_is_seen(broken):
    found = failures("transform_quantize", broken)
    assert found and all(r.error > 0 for r in found)
    if broken is raises:
        assert "RuntimeError: no kernel image" in found[0].case and "more" not in found[0].case


@pytest.mark.parametrize("broken", [ignores_feedback, swaps_steps])
def test_wrong_feedback_is_seen_in_every_case_with_it(broken):
    results = list(conformance.check("mine", "transform_quantize", Implementation(broken, lambda *args: None), CPU))
    assert all(r.ok != ("feedback" in r.case) for r in results)
    assert sum("feedback of eighths" in r.case for r in results) * 3 == sum("feedback" in r.case for r in results) * 2


def forgets_the_bias(*args):
    return ops._fp4_linear(*args[:6], None, *args[7:])


def loses_nan(*args):
    return ops._fp4_linear(*args).nan_to_num()


def rounds_twice(*args):
    y = ops._fp4_linear(*args)
    return y.to(torch.float8_e4m3fn).to(y.dtype)


def reads_padding(*args):
    """Like a kernel that reads swizzled scales as rows."""
    call = bind("fp4_linear", args)
    if call["scale_layout"] == "swizzled":
        rows, groups = len(call["codes"]), call["codes"].numel() * 2 // GROUPS[call["format"]]
        call |= {"scales": call["scales"].flatten()[:groups].view(rows, -1), "scale_layout": "rows"}
    return ops._fp4_linear(*call.values())


def takes_the_first_rows_factor(*args):
    call = bind("fp4_linear", args)
    g = call["weight_global_scale"]
    return ops._fp4_linear(*(call | {"weight_global_scale": g if g is None else g[:1].float()}).values())


WRONG_PRODUCTS = [forgets_the_bias, loses_nan, rounds_twice, reads_padding, takes_the_first_rows_factor]


@pytest.mark.parametrize("broken", WRONG_PRODUCTS)
def test_a_wrong_product_is_seen(broken):
    assert failures("fp4_linear", broken)


def test_refusals_are_recorded():
    results = list(conformance.check("mine", "fp4_linear", Implementation(raises, lambda *args: "never"), CPU))
    assert results and all(r.ok and r.refused == "never" and r.error is None for r in results)


def test_exact_sums_of_errors_are_exact(monkeypatch):
    """fp32 gives what float64 gives, in the conformance's cases and in those of fuzzed calls."""
    fp32, calls = torch.bmm, []

    def bmm(a, b):
        calls.append(torch.equal(fp32(a, b).double(), fp32(a.double(), b.double())))
        return fp32(a, b)

    cases = [c.args for c in conformance.quantizer_cases(CPU) if "eighths" in c.name]
    families = [fuzz.family(0, index, CPU) for index in range(0, 600, len(fuzz.FAMILIES))]
    cases += [c.args for f in families for c in f if c.words.endswith("feedback=eighths")]
    assert len(cases) > 40
    monkeypatch.setattr(feedback.torch, "bmm", bmm)
    for x, t, g, format, rule, _, f in cases:
        feedback.quantize(ops.block_transform(x, t), format, rule, g, f)
    assert all(calls)


def test_fused_references_are_not_the_provider_under_test():
    """The reference of a fused op runs on the CPU, where no provider is used."""
    for op in ("silu_mul_transform_quantize", "rms_norm_transform_quantize", "add_rms_norm_transform_quantize"):
        for case in itertools.islice(conformance.CASES[op](CPU), 3):
            codes, scales, *sums = case.want()
            args = case.args
            assert all(s.shape == args[0].shape for s in sums)
            assert codes.shape[-1] * 2 == args[0].shape[-1] and scales.device == CPU


def test_tables(tmp_path):
    results = list(conformance.check("mine", "fp4_linear", Implementation(ops._fp4_linear, lambda *args: None), CPU))
    rows = deep.summary(results)
    assert [r[:3] for r in rows] == [("mine", "fp4_linear", f) for f in ("int4", "mxfp4", "nvfp4")]
    assert all(r[4] == r[5] == 0 for r in rows)
    times = [Time("a", "op", "mxfp4", "1x2", 2.0, 4.0, ""), Time("b", "op", "mxfp4", "1x2", None, 4.0, "Error: no")]
    assert deep.side_by_side(times) == [["op", "mxfp4", "1x2", "4.0", "2.0 (2.00x)", "Error: no"]]


def test_the_benchmark_asks_every_provider(monkeypatch):
    """One round on a CPU, without a clock: each op of a provider with arguments that it accepts; failures are rows."""
    every = ops.REFERENCE | fused_ops.FUSED_REFERENCE
    takes = {op: Implementation(run, lambda *args: None) for op, run in every.items()}
    table = {
        "mine": takes,
        "broken": {"fp4_linear": Implementation(raises, lambda *args: None)},
        "refuses": {"fp4_linear": Implementation(raises, lambda *args: "never")},
    }
    monkeypatch.setattr(timing, "available", lambda device: table)
    monkeypatch.setattr(timing, "QUANTIZER_SHAPES", ((3, 96),))
    monkeypatch.setattr(timing, "WEIGHTS", ((32, 96),))
    monkeypatch.setattr(timing, "ROWS", (1, 5))
    times = list(timing.benchmark(CPU, timing.Plan(timing.run_once, lambda nbytes: 2)))
    assert sum(t.provider == "mine" and t.microseconds == 1.0 for t in times) == 2 * 3 + 2 * 2
    assert sum(t.provider == "broken" and t.note == "RuntimeError: no kernel image" for t in times) == 2 * 2
    assert len(times) == 14
    few = list(timing.benchmark(CPU, timing.Plan(timing.run_once, lambda nbytes: 1, lambda index: index == 1)))
    assert {t.shape for t in few} == {"5x32x96"}


def test_deep_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA GPU")
    run = CliRunner().invoke(app, ["doctor", "--deep"])
    assert run.exit_code == 1 and "leave --deep out" in run.output


@pytest.mark.gpu
def test_the_report(tmp_path, monkeypatch):
    """Every provider of this GPU conforms, and the report says so. Times are left out here."""
    monkeypatch.setattr(deep, "benchmark", lambda device: iter(()))
    monkeypatch.setattr(deep, "compile_all", lambda device: None)
    out = tmp_path / "report.json"
    run = CliRunner().invoke(app, ["doctor", "--deep", "--out", str(out)])
    assert run.exit_code == 0, run.output
    report = json.loads(out.read_text())
    assert report["conformance"] and all(r["ok"] for r in report["conformance"])
    assert {"reference", "triton"} <= {r["provider"] for r in report["conformance"]}
