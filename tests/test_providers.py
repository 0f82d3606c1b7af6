"""Which provider computes an op: the table, a forced provider, the fallback. Needs no GPU and no Triton."""

from contextlib import nullcontext

import pytest
import torch

from wush_compile.diagnostics import doctor
from wush_compile.errors import ConfigError, SignatureError
from wush_compile.kernels import dispatch as kernels
from wush_compile.kernels.provider import Provider, implementations
from wush_compile.ops import core as ops


def test_the_report_on_a_cpu():
    report = doctor.examine("cpu")
    assert report["ops"]["fp4_linear"][-1] == "reference" and report["capability"] is None
    tested = {*ops.REFERENCE, "fp4_grouped_linear"}
    assert {check.op for check in report["self_test"]} == set(doctor.SELF_TESTS) == tested
    assert all(check.ok for check in report["self_test"]), report["self_test"]


def test_the_self_test_can_fail(monkeypatch):
    real = ops.REFERENCE["transform_quantize"]

    def broken(*args):
        codes, scales = real(*args)
        return codes, scales + 1

    def failing(*args):
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setitem(ops.REFERENCE, "transform_quantize", broken)
    checks = doctor.self_test(torch.device("cpu"), "transform_quantize")
    assert checks and not any(check.ok for check in checks)
    monkeypatch.setitem(ops.REFERENCE, "observe", failing)
    (check,) = doctor.self_test(torch.device("cpu"), "observe")
    assert not check.ok and "RuntimeError: no kernel image" in check.case and "more" not in check.case


def test_a_forced_provider_must_exist(monkeypatch):
    monkeypatch.setenv("WUSH_PROVIDER", "tritn")
    with pytest.raises(ConfigError, match="did you mean 'triton'"):
        kernels.forced()


class Fake:
    """A stand-in for a tensor on a device, with all that `dispatch` reads."""

    device = torch.device("cuda", 0)


def test_a_failing_provider_is_left_out_with_one_warning(monkeypatch, caplog):
    calls = []

    def broken(*args):
        calls.append("triton")
        raise RuntimeError("no kernel image\nmore")

    table = {"fp4_linear": [("triton", kernels.Implementation(broken, lambda *args: None))]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    with caplog.at_level("WARNING", logger="wush_compile"):
        assert kernels.dispatch("fp4_linear", lambda *args: "reference", Fake()) == "reference"
        assert kernels.dispatch("fp4_linear", lambda *args: "reference", Fake()) == "reference"
    assert calls == ["triton"] and len(caplog.records) == 1
    assert "triton failed in fp4_linear" in caplog.text and "no kernel image" in caplog.text
    table["fp4_linear"] = [("triton", kernels.Implementation(broken, lambda *args: None))]
    monkeypatch.setenv("WUSH_PROVIDER", "triton")
    with pytest.raises(RuntimeError, match="no kernel image"):
        kernels.dispatch("fp4_linear", lambda *args: "reference", Fake())


def test_a_provider_that_refuses_is_passed_by(monkeypatch):
    table = {"fp4_linear": [("triton", kernels.Implementation(lambda *a: "triton", lambda *a: "too wide"))]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    assert kernels.dispatch("fp4_linear", lambda *args: "reference", Fake()) == "reference"


@pytest.mark.parametrize("prologue", ["", "rms_norm_", "add_rms_norm_", "silu_mul_"])
def test_the_cuda_kernels_leave_search_and_feedback_to_triton(prologue, monkeypatch):
    """With a reason that names the rule, or feedback; `mse` they compute."""
    from wush_compile.kernels import cuda

    class OnGpu(torch.Tensor):
        device, is_cuda = torch.device("cuda", 0), True

    op = prologue + "transform_quantize"
    computed = kernels.Implementation(lambda *args: "cuda", *cuda.IMPLEMENTATIONS[op][1:])
    table = {op: [("cuda", computed), ("triton", kernels.Implementation(lambda *args: "triton", lambda *args: None))]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    monkeypatch.setattr(cuda, "_target", lambda x: "sm_100a")
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    x = torch.zeros(2, 64, dtype=torch.bfloat16).as_subclass(OnGpu)
    norm = (None, 1e-5, None, "none")
    args = {"": (x,), "rms_norm_": (x, *norm), "add_rms_norm_": (x, x, *norm), "silu_mul_": (x, x)}[prologue]
    for rule, expected in (("mse", "cuda"), ("search", "triton")):
        call = (*args, None, None, "nvfp4", rule)
        assert kernels.dispatch(op, lambda *args: "reference", *call) == expected
        assert kernels.chosen(op, 0, call) == expected
    assert computed.refuses(*call) == "no CUDA kernel has the scale rule search"
    call = (*args, None, None, "nvfp4", "mse", "rows", torch.zeros(4, 6, 4, dtype=torch.bfloat16))
    assert kernels.dispatch(op, lambda *args: "reference", *call) == "triton"
    assert computed.refuses(*call) == "no CUDA kernel rounds with feedback"


def test_a_callers_mistake_costs_no_provider(monkeypatch):
    def fails(*args):
        raise ValueError("shapes do not fit")

    table = {"fp4_linear": [("triton", kernels.Implementation(fails, lambda *args: None))]}
    monkeypatch.setattr(kernels, "resolve", lambda device: table)
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    with pytest.raises(ValueError):
        kernels.dispatch("fp4_linear", fails, Fake())
    assert len(table["fp4_linear"]) == 1


def test_what_writes_in_place_is_not_tried_again(monkeypatch):
    def fails(moment):
        moment.add_(1)
        raise ValueError("half done")

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(
        kernels, "resolve", lambda device: {"observe": [("triton", kernels.Implementation(fails, lambda *args: None))]}
    )
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    moment = torch.zeros(()).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match="triton failed in observe.*WUSH_PROVIDER=reference"):
        kernels.dispatch("observe", fails, moment)
    assert float(moment) == 1


def test_capability_decides():
    assert kernels._triton_unavailable((7, 5)) is not None
    assert doctor.arithmetic("mxfp4", (9, 0)).startswith("emulated") and "native" in doctor.arithmetic("nvfp4", (12, 0))


def test_why_there_is_no_gpu(monkeypatch):
    """No driver, no CUDA in torch: each in one line with its remedy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install one with CUDA" in doctor.why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA driver" in doctor.why_no_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert doctor.why_no_gpu().endswith("the CPU")


def test_a_slower_provider_is_asked_last(monkeypatch):
    def provider(name, slower):
        return name, kernels.Implementation(lambda *args: name, lambda *args: None, lambda *args: slower)

    for first, second, expected in ((True, False, "b"), (False, False, "a"), (True, True, "a"), (False, True, "a")):
        monkeypatch.setattr(kernels, "resolve", lambda device: {"op": [provider("a", first), provider("b", second)]})
        assert kernels.dispatch("op", lambda *args: "reference", Fake()) == expected


def test_who_is_faster_on_hopper(monkeypatch):
    from wush_compile.kernels import cuda

    monkeypatch.setattr(cuda, "_target", lambda x: "sm_90a")
    assert cuda.prefer_others(torch.zeros(2, 32)) and cuda.prefer_others_silu_mul(torch.zeros(2, 511, 32))
    assert not cuda.prefer_others_silu_mul(torch.zeros(2, 512, 32))
    monkeypatch.setattr(cuda, "_target", lambda x: "sm_120a")
    assert not cuda.prefer_others(torch.zeros(2, 32)) and not cuda.prefer_others_silu_mul(torch.zeros(2, 32))


SHIPPED = [pytest.param(provider, id=provider.name) for provider in kernels.PROVIDERS]


@pytest.mark.parametrize("provider", SHIPPED)
def test_shipped_providers_fit_their_ops(provider):
    if provider.name == "triton":
        pytest.importorskip("triton")
    assert implementations(provider)


def good(x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None, tile=None):
    """`transform_quantize`, with a parameter of its own."""


def swapped(x, global_scale, transform, format, scale_rule, scale_layout="rows", feedback=None):
    """As `good`, two arguments in the other order."""


def short(x, transform, global_scale, format):
    """As `good`, one argument too few."""


def demanding(x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None, *, tile):
    """As `good`, but with a parameter that no caller passes."""


def observe(x, mask, moment, count, sample, seed=1):
    """`observe` with another default."""


@pytest.mark.parametrize(
    "op, functions, error",
    [
        ("transform_quantize", (good, lambda x, *others: None), None),
        ("transform_quantize", (swapped, good), "mine's `run` .* parameter 1 is 'global_scale', .* 'transform'"),
        ("transform_quantize", (good, short), "mine's `refuses` of wush::transform_quantize .* lacks 'scale_rule'"),
        ("transform_quantize", (demanding, good), "'tile' is not in the schema"),
        (
            "transform_quantize",
            (good, good, lambda gate, *others: False),
            "mine's `prefer_others` .* 'gate', .* has 'x'",
        ),
        ("observe", (observe, lambda *args: None), "'seed' does not default to 0"),
    ],
)
def test_a_provider_that_does_not_fit_its_op_is_an_error(op, functions, error, monkeypatch):
    provider = Provider("mine", lambda capability: None, lambda: {op: kernels.Implementation(*functions)})
    monkeypatch.setattr(kernels, "PROVIDERS", (provider,))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    with nullcontext() if error is None else pytest.raises(SignatureError, match=error):
        assert list(kernels.resolve.__wrapped__(0)) == [op]
