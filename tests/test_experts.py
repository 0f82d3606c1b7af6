"""Mixtures of experts: found by dataflow, calibrated from routed rows, quantized, saved, loaded, compiled."""

import copy
import json
import pickle

import pytest
import torch
from helpers import emulates_rounding, files, same_tensors
from models import tokens
from moe_models import FAMILIES, moe
from pass_harness import count_ops
from torch import nn
from torch.export import Dim
from transformers import AutoModelForCausalLM

import wush_compile as wc
from wush_compile.calibration import loop as stages
from wush_compile.calibration import verify
from wush_compile.calibration.streaming import open_checkpoint
from wush_compile.checkpoint import conversion
from wush_compile.checkpoint.files import Shards
from wush_compile.errors import CheckpointError, ConfigError, NonFiniteError
from wush_compile.experts import ExpertGroup, WushExperts
from wush_compile.formats import dequantize
from wush_compile.modules import named_groups
from wush_compile.solver import experts as solver_of_experts
from wush_compile.solver.experts import batches, pooled_moment, solve_share, solve_shared

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
    solve = stages.solve_common

    def broken(group, *args):
        if "layers.1.mlp.experts.down" in group.name:
            raise KeyboardInterrupt
        return solve(group, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "solve_common", broken)
        stream("resumed")
    stream("resumed")
    assert files(tmp_path / "resumed") == files(tmp_path / "memory")
    assert same_tensors(wc.load(tmp_path / "streamed"), model)
    wc.save(model, tmp_path / "saved")
    assert same_tensors(wc.load(tmp_path / "saved"), model)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "nemotron_h"])
def test_experts_are_joined_as_transformers_joins_them(kind, tmp_path, monkeypatch):
    """Matrix by matrix into their places, without a second copy of all of them."""
    moe(kind).save_pretrained(tmp_path)
    model, tensors = open_checkpoint(tmp_path)
    names = [n for n, p in model.named_parameters() if p.dim() == 3 and n in tensors._conversion.sources]
    assert len(names) == 2
    here = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "tensors", None)
        joined = tensors.load(names, here)
    monkeypatch.setattr(conversion, "_joins_experts", lambda converter: False)
    for name, tensor in tensors.load(names, here).items():
        assert tensor.dtype == joined[name].dtype and torch.equal(tensor, joined[name]) and tensor.any()


def test_shares_of_experts_are_parted_alike():
    assert batches(range(3, 13), 4) == [range(3, 4), range(4, 8), range(8, 12), range(12, 13)]
    assert batches(range(8, 16), 8) == [range(8, 16)] and batches(range(2), 1) == [range(1), range(1, 2)]


# -- settings and bad input ------------------------------------------------------------------------------------------

RTN = {"solver": "rtn", "transform": "hadamard", "progress": False}


def test_patterns_name_experts():
    experts = "model.layers.0.mlp.experts"
    model = wc.quantize(moe("mixtral"), DATA, ignore=("*.experts",), **RTN)
    assert not product_names(model) and not isinstance(model.model.layers[0].mlp.experts, WushExperts)
    ignored = model.wush_quantization.ignored
    assert ignored[f"{experts}.down_proj"] == "ignored by the configuration ('*.experts')"
    overrides = {"*.experts": {"format": "nvfp4"}, "*.experts.down_proj": {"activation_format": "fp8"}}
    model = wc.quantize(moe("mixtral"), DATA, overrides=overrides, **RTN)
    found = {name: (group.format, group.operand) for name, group in named_groups(model)}
    assert found[f"{experts}.gate_up_proj"] == ("nvfp4", "nvfp4") and found[f"{experts}.down_proj"] == ("nvfp4", "fp8")
    assert found["model.layers.0.self_attn.q_proj.group"] == ("mxfp4", "mxfp4")
    with pytest.raises(ConfigError, match="matches no module"):
        wc.quantize(moe("mixtral"), DATA, ignore=("*.expert",), **RTN)


def test_a_width_that_does_not_fit_leaves_the_experts():
    model = wc.quantize(moe("mixtral", intermediate_size=48), DATA, **RTN)
    ignored = model.wush_quantization.ignored
    reason = "width 48 is not a multiple of mxfp4's group of 32"
    assert ignored["model.layers.0.mlp.experts.down_proj"] == reason
    assert ignored["model.layers.0.mlp.experts.gate_up_proj"].endswith(reason)


def test_starved_experts_are_named(caplog):
    """A router that never chooses expert 2, which is solved with the moment of the others."""
    model = moe("glm4_moe")
    model.model.layers[0].mlp.gate.e_score_correction_bias[2] = -1e9
    data = [tokens(8, 64, seed=s) for s in range(3)]
    wc.quantize(model, data, progress=False)
    [warning] = [r.getMessage() for r in caplog.records if "experts saw fewer" in r.getMessage()]
    report = model.wush_quantization.report["model.layers.0.mlp.experts.gate_up_proj"]
    assert report["tokens_by_expert"][2] == 0 and min(report["tokens_by_expert"][i] for i in (0, 1, 3)) >= 512
    assert "1 experts saw fewer than 512" in warning and "(model.layers.0.mlp.experts: 2)" in warning
    text = wc.explain(model)
    assert "few tokens for 1 of 4 experts" in text and "2 products of experts" in text


def test_an_expert_with_nan_is_named():
    model = moe("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"mlp\.experts\.down_proj\[2\] has NaN"):
        wc.quantize(model, DATA, **RTN)
    model = moe("mixtral")
    with torch.no_grad():  # finite weights whose products overflow
        model.model.layers[0].mlp.experts.gate_up_proj[1] = 1e30
    with pytest.raises(NonFiniteError, match=r"mlp\.experts\.down_proj\[1\]: its calibration inputs hold NaN or Inf"):
        wc.quantize(model, DATA, progress=False)


def test_another_number_of_experts_is_refused(tmp_path):
    wc.save(wc.quantize(moe("mixtral"), DATA, **RTN), tmp_path / "four")
    config = json.loads((tmp_path / "four/config.json").read_text())
    config["num_local_experts"] = 8
    (tmp_path / "four/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has 8 experts in this MixtralForCausalLM, 4 in the checkpoint"):
        wc.load(tmp_path / "four")


class Bare(nn.Module):
    """Experts of the user's own, multiplied by a batched product."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(64, 64), nn.Parameter(torch.randn(4, 64, 64))

    def forward(self, x):
        return torch.bmm(self.first(x).expand(4, -1, -1), self.experts)


def test_what_is_not_understood_is_left_with_a_reason():
    model = wc.quantize(Bare(), [torch.randn(1, 7, 64)], **RTN)
    assert model.wush_quantization.ignored == {
        "experts": "3-D weight of Bare, which does not multiply rows in the order of experts"
    }


# -- what runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded():
    """A tiny Qwen3-MoE, quantized by plain rounding."""
    return wc.quantize(moe("qwen3_moe"), DATA, **RTN)


def test_the_graph_of_a_layer_before_and_after(rounded):
    """Products of rows in the order of experts become products of tokens, which are quantized once."""
    before, after = wc.explain(rounded, view="captured").split("\n\n")[-2:]
    assert before.count("aten._grouped_mm(") == 2 and "wush." not in before
    calls = [line.split(" = ")[1].split("(")[0] for line in after.split("\n") if "= wush." in line]
    experts = ["wush.transform_quantize", "wush.fp4_grouped_linear"] * 2
    assert calls[-4:] == experts and "_grouped_mm(" not in after and "aten.index(view" not in after
    [first, second] = [line for line in after.split("\n") if "= wush.fp4_grouped_linear(" in line]
    assert "floor_divide" in first and "floor_divide" not in second  # the token of each row


def test_loops_over_experts_are_traced_as_products():
    model = moe("qwen3_moe")
    model.set_experts_implementation("eager")
    assert len(product_names(wc.quantize(model, DATA, **RTN))) == 2
    assert model.config._experts_implementation == "eager"


def test_gradients_pass_through_experts(rounded):
    """Straight through: as for weights that are dequantized, and inputs that are not quantized."""
    experts = rounded.model.layers[0].mlp.experts
    x = torch.randn(5, 64, requires_grad=True)
    index, weights = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 3], [1, 0]]), torch.rand(5, 2)
    group = experts.gate_up_proj
    offs = torch.tensor([3, 6, 8, 10], dtype=torch.int32)
    order = index.reshape(-1).sort().indices
    grad = torch.randn(10, 128)
    group(x, offs, order // 2).backward(grad)
    w = dequantize(group.weight_packed, group.weight_scale, group.format)  # [E, N, K]
    t = torch.block_diag(*group.input_transform.float().expand(2, -1, -1))
    owner = index.reshape(-1)[order]
    expected = torch.zeros(5, 64).index_add_(0, order // 2, torch.einsum("sn,snk->sk", grad, w[owner]) @ t)
    assert torch.allclose(x.grad, expected, atol=1e-4)
    assert experts(x.bfloat16(), index, weights.bfloat16()).requires_grad


def test_copies_of_a_model_are_equal(rounded):
    other = copy.deepcopy(rounded)
    assert same_tensors(other, rounded) and pickle.loads(pickle.dumps(rounded.model.layers[0].mlp)) is not None
    with torch.no_grad():
        assert torch.equal(other(DATA[0]).logits, rounded(DATA[0]).logits)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@pytest.mark.parametrize("kind, gate", [("qwen3_moe", "silu_mul"), ("gpt_oss", "swiglu_oai")])
def test_exported_and_fused_programs_have_the_same_bits(kind, gate):
    model = Logits(wc.quantize(moe(kind), DATA, **RTN))
    with torch.no_grad():
        program = torch.export.export(model, (tokens(2, 9),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
        wc.fuse(program)
        counts = count_ops(program.graph)
        fused = {"rms_norm_keep_transform_quantize": 1, f"{gate}_transform_quantize": 1, "fp4_grouped_linear": 2}
        assert fused.items() <= counts.items()
        for shape in ((2, 9), (1, 1), (3, 7)):
            assert torch.equal(program.module()(tokens(*shape)), model(tokens(*shape)))


@pytest.mark.skipif(not emulates_rounding(), reason="Inductor's C++ code rounds differently from eager")
def test_compiled_with_a_static_cache(rounded):
    """One graph, whose tokens are those of the eager model."""
    model = copy.deepcopy(rounded)
    settings = dict(max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    expected = model.generate(tokens(2, 9), **settings)
    model.forward = torch.compile(model.forward, backend="wush", fullgraph=True)
    with torch._inductor.config.patch(emulate_precision_casts=True):  # tokens may differ without it
        assert torch.equal(model.generate(tokens(2, 9), **settings), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_calibrated_on_a_gpu(kind):
    """From CPU memory, layer by layer, and as a whole; then it runs there, eager and compiled."""
    ids = DATA[0].cuda()
    whole, offloaded = (moe(kind, layers=2) for _ in range(2))
    with torch.no_grad():
        original = copy.deepcopy(whole).cuda()(ids, use_cache=False).logits
    wc.quantize(whole.cuda(), [ids], progress=False)
    wc.quantize(offloaded, DATA, progress=False, device="cuda")
    offloaded.cuda()
    for model in (whole, offloaded):
        report = model.wush_quantization.report
        assert all(report[name]["relative_loss"] < 0.03 for name in product_names(model))
    with torch.no_grad():
        logits = whole(ids, use_cache=False).logits
        # A code that another rounding flips, and a token that goes to another expert, move logits of these tiny models:
        # by less than what quantization itself moves.
        lost = (logits - original).norm()
        assert lost < 0.2 * original.norm()
        assert (logits - offloaded(ids, use_cache=False).logits).norm() < 0.2 * logits.norm()
        compiled = torch.compile(whole, backend="wush", fullgraph=True)(ids, use_cache=False).logits
        assert (logits - compiled).norm() < lost
        graphed = torch.compile(whole, backend="wush", mode="reduce-overhead")
        for _ in range(3):
            replayed = graphed(ids, use_cache=False).logits.clone()
        assert (logits - replayed).norm() < lost


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_experts_are_solved_side_by_side_on_a_gpu(format, monkeypatch):
    """Alone, in fours, and in shares that part them otherwise: the same, but for sums in another order."""
    recipe, generator = wc.WushConfig(format=format).recipe_of("x"), torch.Generator("cuda").manual_seed(0)
    weights = torch.randn(6, 96, 256, device="cuda", generator=generator).bfloat16()
    x = torch.randn(6, 700, 256, device="cuda", generator=generator)
    given = dict(moment=x.mT @ x, rows=[700] * 6, name="x")
    given["pooled"] = pooled_moment(given["moment"], torch.full((6,), 700, device="cuda"), "x")
    t, *_ = solve_shared(weights, recipe, pooled=given["pooled"], sample=x[0, :64], name="x")
    found = []
    for together, shares in ((1, [range(6)]), (4, [range(6)]), (4, [range(3), range(3, 6)])):
        monkeypatch.setattr(solver_of_experts, "_together", lambda *args, together=together: together)
        parts = [solve_share(weights, recipe, t, share, **given) for share in shares]
        found.append([torch.cat([getattr(p, name) for p in parts]) for name in ("weight_packed", "weight_scale")])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert (got != want).float().mean() < 1e-3
