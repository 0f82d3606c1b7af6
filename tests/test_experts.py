"""Mixtures of experts: found by dataflow, calibrated from routed rows, quantized, saved, loaded, compiled."""

import pytest
import torch
from helpers import same_tensors
from models import tokens
from moe_models import FAMILIES, moe

import wush_compile as wc
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
    wc.quantize(model, DATA, progress=False)
    return model, before


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
