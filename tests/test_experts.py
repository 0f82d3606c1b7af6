"""Mixtures of experts: found by dataflow, calibrated from routed rows, quantized, saved, loaded, compiled."""

import pytest
import torch
from helpers import files, same_tensors
from models import tokens
from moe_models import FAMILIES, moe
from transformers import AutoModelForCausalLM

import wush_compile as wc
from wush_compile.calibration import loop as stages
from wush_compile.calibration import verify
from wush_compile.experts import ExpertGroup
from wush_compile.modules import named_groups

DATA = [tokens(4, 32, seed=1)]


def product_names(model) -> list[str]:
    """The products of experts of a quantized model."""
    return [name for name, group in named_groups(model) if isinstance(group, ExpertGroup)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tiny model of each family, quantized by GPTQ with WUSH transforms, and its logits before."""
    model = moe(request.param)
    with torch.no_grad():
        before = model(DATA[0]).logits
    with pytest.MonkeyPatch.context() as patch:  # the model computes exactly what the rewritten graph computes
        patch.setattr(verify, "_first_difference", unequal)
        wc.quantize(model, DATA, progress=False)
    return model, before


def unequal(*args):
    raise AssertionError("the model with quantized experts differs from its graph")


def test_every_family(family, tmp_path):
    model, before = family
    with torch.no_grad():
        logits = model(DATA[0]).logits
    assert (logits - before).norm() < 0.2 * before.norm()
    assert len(product_names(model)) == 2
    record = model.wush_quantization
    for name in product_names(model):
        report = record.report[name]
        assert sum(report["tokens_by_expert"]) == report["tokens"] == 2 * DATA[0].numel()
        assert report["relative_loss"] < 0.03 and report["experts"] == 4
    for name, reason in record.ignored.items():
        assert "experts.gate_up" not in name and "experts.down" not in name, reason
        if name.endswith(("mlp.gate", "router", "mixer.gate")):
            assert reason == "routes tokens to experts, which stays in 16 bits"
        if name.endswith("shared_expert_gate"):
            assert reason == "gates a shared expert, which stays in 16 bits"
    wc.save(model, tmp_path / "saved")
    loaded = wc.load(tmp_path / "saved")
    assert same_tensors(loaded, model)
    with torch.no_grad():
        assert torch.equal(loaded(DATA[0]).logits, logits)


@pytest.mark.parametrize("kind, settings", [("qwen3_moe", {}), ("gpt_oss", dict(format="nvfp4", solver="rtn"))])
def test_streamed_and_resumed_files_are_those_of_the_model_in_memory(kind, settings, tmp_path, monkeypatch):
    """The source holds a matrix an expert (Qwen3-MoE), or transposed ones with biases (gpt-oss)."""
    moe(kind, layers=2).save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    wc.quantize(model, DATA, progress=False, out=tmp_path / "memory", **settings)

    def stream(out):
        return wc.quantize_checkpoint(tmp_path / "source", DATA, progress=False, out=tmp_path / out, **settings)

    stream("streamed")
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    solve = stages.solve_group

    def broken(group, *args):
        if "layers.1.mlp.experts.down" in group.name:
            raise KeyboardInterrupt
        return solve(group, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "solve_group", broken)
        stream("resumed")
    stream("resumed")
    assert files(tmp_path / "resumed") == files(tmp_path / "memory")
    assert same_tensors(wc.load(tmp_path / "streamed"), model)
    wc.save(model, tmp_path / "saved")
    assert same_tensors(wc.load(tmp_path / "saved"), model)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_calibrated_on_a_gpu(kind):
    """From CPU memory, layer by layer, and as a whole; then it runs there, eager and compiled."""
    ids = DATA[0].cuda()
    whole, offloaded = (moe(kind, layers=2) for _ in range(2))
    wc.quantize(whole.cuda(), [ids], progress=False)
    wc.quantize(offloaded, DATA, progress=False, device="cuda")
    offloaded.cuda()
    for model in (whole, offloaded):
        report = model.wush_quantization.report
        assert all(report[name]["relative_loss"] < 0.03 for name in product_names(model))
    with torch.no_grad():
        logits = whole(ids, use_cache=False).logits
        assert (logits - offloaded(ids, use_cache=False).logits).norm() < 0.2 * logits.norm()
        compiled = torch.compile(whole, backend="wush", fullgraph=True)(ids, use_cache=False).logits
        assert (logits - compiled).norm() < 0.1 * logits.norm()
        graphed = torch.compile(whole, backend="wush", mode="reduce-overhead")
        for _ in range(3):
            replayed = graphed(ids, use_cache=False).logits.clone()
        assert (logits - replayed).norm() < 0.1 * logits.norm()
