"""Random calls: their families cover all ops, hold for the reference, repeat from a seed, and find what is broken."""

import torch
from typer.testing import CliRunner

from wush_compile.cli import app
from wush_compile.diagnostics import fuzz
from wush_compile.formats import ACTIVATION_FORMATS, FORMATS, WEIGHT_FORMATS
from wush_compile.kernels.provider import Implementation
from wush_compile.ops.core import REFERENCE
from wush_compile.ops.fused import FUSED_REFERENCE
from wush_compile.ops.grouped import GROUPED_REFERENCE

CPU = torch.device("cpu")
EVERY = REFERENCE | FUSED_REFERENCE | GROUPED_REFERENCE


def takes_all(run):
    return Implementation(run, lambda *args: None)


def first(monkeypatch, families, **table):
    monkeypatch.setattr(fuzz, "providers", lambda device: {"mine": table})
    return fuzz.work("cpu", 1e9, 0, families=families)


def test_the_reference_holds(monkeypatch):
    table = {op: takes_all(run) for op, run in EVERY.items() if op != "observe"}
    counts, failures, done = first(monkeypatch, 200, **table)
    assert not failures and done == 200
    assert {op for _, op, *_ in counts} == set(table)
    assert {format for _, _, format, _ in counts} == {*FORMATS, *ACTIVATION_FORMATS, *WEIGHT_FORMATS}


def test_a_family_repeats_from_its_number():
    for index in range(10):
        for a, b in zip(fuzz.family(3, index, CPU), fuzz.family(3, index, CPU), strict=True):
            assert a.words == b.words
            for left, right in zip(a.args, b.args, strict=True):
                assert not isinstance(left, torch.Tensor) or fuzz.share_different((left,), (right,)) == 0


def wrong_code(*args):
    codes, scales = REFERENCE["transform_quantize"](*args)
    return codes.index_fill(-1, torch.tensor([codes.shape[-1] - 1]), 3), scales


def unsteady(*args):
    return REFERENCE["fp4_linear"](*args) * (1 + 1e-4 * torch.rand(()))


def raises(*args):
    raise RuntimeError("no kernel image")


def test_what_is_broken_is_found(monkeypatch):
    broken = dict(
        transform_quantize=takes_all(wrong_code), fp4_linear=takes_all(unsteady), fp4_grouped_linear=takes_all(raises)
    )
    _, failures, _ = first(monkeypatch, 10, **broken)
    text = {f.op: f.error for f in failures}
    assert "at most 0" in text["transform_quantize"]
    assert "second call" in text["fp4_linear"]
    assert text["fp4_grouped_linear"] == "RuntimeError: no kernel image"
    refuses = {"fp4_linear": Implementation(raises, lambda *args: "never")}
    counts, failures, _ = first(monkeypatch, 10, **refuses)
    assert not failures and {kind for *_, kind in counts} == {"refused"}


def test_the_command(monkeypatch):
    run = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--fuzz", "0.01", "--seed", "5"])
    assert run.exit_code == 0 and "of seed 5, 0 outside the contract" in run.output, run.output
    monkeypatch.setattr(fuzz, "providers", lambda device: {"mine": {"fp4_linear": takes_all(raises)}})
    run = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--fuzz", "0.01"])
    assert run.exit_code == 1 and "family 3: mine fp4_linear" in run.output, run.output
    assert CliRunner().invoke(app, ["doctor", "--fuzz", "0"]).exit_code == 1
