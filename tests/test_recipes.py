"""Several recipes in one model: groups by recipe; then saved, loaded, resumed, compiled and exported."""

import copy
import json

import pytest
import torch
from helpers import assert_like_eager, emulates_rounding, files, quantize
from models import plain, tokens
from torch.export import Dim

import wush_compile as wc
from wush_compile.checkpoint.record import quantization_of
from wush_compile.errors import ConfigError
from wush_compile.graphs.printing import count_ops
from wush_compile.modules import named_groups

OVERRIDES = {
    "*.down_proj": {"format": "nvfp4", "transform": "hadamard"},
    "model.layers.1.self_attn.*": {"format": "int4"},
    "*.k_proj": {"transform_block_size": 64},
    "model.layers.0.*.up_proj": {"weight_scale_rule": "absmax"},
}


@pytest.fixture(scope="module")
def quantized():
    return quantize(plain("llama"), tokens(2, 16), format="mxfp4", overrides=OVERRIDES)


def described(model) -> dict[str, tuple]:
    """First member -> (other members, format, transform block)."""
    return {
        group.members[0].name.removeprefix("model.layers."): (
            [m.name.rpartition(".")[2] for m in group.members[1:]],
            group.recipe.format,
            group.block_size,
        )
        for _, group in named_groups(model)
    }


def test_siblings_that_disagree_form_groups_of_their_own(quantized):
    assert described(quantized) == {
        "0.self_attn.q_proj": (["v_proj"], "mxfp4", 32),
        "0.self_attn.k_proj": ([], "mxfp4", 64),
        "0.self_attn.o_proj": ([], "mxfp4", 32),
        "0.mlp.gate_proj": ([], "mxfp4", 32),
        "0.mlp.up_proj": ([], "mxfp4", 32),
        "0.mlp.down_proj": ([], "nvfp4", 16),
        "1.self_attn.q_proj": (["v_proj"], "int4", 32),
        "1.self_attn.k_proj": ([], "int4", 64),
        "1.self_attn.o_proj": ([], "int4", 32),
        "1.mlp.gate_proj": (["up_proj"], "mxfp4", 32),
        "1.mlp.down_proj": ([], "nvfp4", 16),
    }
    groups = {entry["members"][0]: entry["recipe"] for entry in quantization_of(quantized).groups}
    assert groups["model.layers.1.self_attn.k_proj"] == {"format": "int4", "transform_block_size": 64}
    assert groups["model.layers.0.mlp.down_proj"] == {"format": "nvfp4", "transform": "hadamard"}
    assert groups["model.layers.0.self_attn.q_proj"] == {}


@pytest.mark.parametrize(
    "settings, override",
    [
        ({"solver": "rtn"}, {"correction": 1.0}),
        ({"transform": "hadamard"}, {"activation_rounding": "nearest"}),
        ({"activation_format": "fp8"}, {"activation_rounding": "nearest"}),
    ],
)
def test_a_setting_without_effect_parts_no_siblings(settings, override):
    plainly = quantize(plain("llama"), tokens(2, 16), **settings)
    model = quantize(plain("llama"), tokens(2, 16), overrides={"*.q_proj": override}, **settings)
    assert described(model) == described(plainly)
    states = plainly.state_dict(), model.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_group_is_what_it_would_be_alone():
    """With rounding to nearest, a linear's tensors depend on its own recipe and on the layers before it."""
    mixed = quantize(plain("llama", layers=1), tokens(2, 16), overrides={"*.down_proj": {"format": "nvfp4"}})
    other = quantize(plain("llama", layers=1), tokens(2, 16), overrides={"*.[oudgkqv]*_proj": {"seed": 0}})
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        a, b = (m.get_submodule(f"model.layers.0.{name}").owner.state_dict() for m in (mixed, other))
        assert a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)
    assert mixed.get_submodule("model.layers.0.mlp.down_proj").owner.format == "nvfp4"


@torch.no_grad()
def test_saved_and_loaded_exactly(quantized, tmp_path):
    wc.save(quantized, tmp_path / "a")
    loaded = wc.load(tmp_path / "a")
    assert described(loaded) == described(quantized)
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, quantized(ids).logits)
    wc.save(loaded, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert settings["config"]["overrides"] == [[p, s] for p, s in OVERRIDES.items()]


def test_the_journal_writes_and_restores_recipes(tmp_path):
    settings = dict(overrides=OVERRIDES, progress=False, solver="rtn")
    whole = wc.quantize(plain("llama"), [tokens(2, 16)], out=tmp_path / "a", **settings)
    wc.save(whole, tmp_path / "b")
    again = wc.quantize(plain("llama"), [tokens(2, 16)], out=tmp_path / "a", **settings)  # everything is restored
    assert described(again) == described(whole)
    assert quantization_of(again).report == quantization_of(whole).report
    assert torch.equal(again(tokens(1, 5)).logits, whole(tokens(1, 5)).logits)
    with pytest.raises(ConfigError, match="was begun with overrides"):
        wc.quantize(plain("llama"), [tokens(2, 16)], out=tmp_path / "a", solver="rtn", progress=False)


@torch.no_grad()
def test_compiled(quantized):
    model, ids = copy.deepcopy(quantized), tokens(2, 9)
    options = {"emulate_precision_casts": True} if emulates_rounding() else {}
    run = torch.compile(model, backend="wush", options=options)
    with wc.trace_graphs() as log:
        assert_like_eager(
            lambda: run(ids, use_cache=False).logits,
            lambda: model(ids, use_cache=False).logits,
            exact=emulates_rounding(),
        )
    counts = log.graphs[0].snapshots[-1].counts
    assert counts["fp4_linear"] == 11


@torch.no_grad()
def test_exported(quantized):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = quantized

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    ids = tokens(2, 9)
    program = torch.export.export(Logits(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    wc.fuse(program)
    assert count_ops(program.graph)["fp4_linear"] == 11
    for shape in ((2, 9), (3, 7), (1, 1)):
        ids = tokens(*shape)
        assert torch.equal(program.module()(ids), quantized(ids, use_cache=False).logits)


def test_overrides_that_change_nothing_are_errors():
    def refused(words, **settings):
        with pytest.raises(ConfigError, match=words):
            quantize(plain("llama"), tokens(2, 16), **settings)

    refused(r"overrides pattern '\*.dwn_proj' matches no module of LlamaForCausalLM", overrides={"*.dwn_proj": {}})
    refused("did you mean 'model.layers.0.mlp.down_proj'", overrides={"model.layers.0.mlp.down_prj": {}})
    refused("matches no linear that is quantized: lm_head is not quantized, ignored", overrides={"lm_head": {}})
    refused(r"matches no linear that is quantized", overrides={"*.input_layernorm": {"format": "nvfp4"}})


def test_the_head_is_quantized_where_ignore_says_so():
    model = quantize(plain("llama"), tokens(2, 16), ignore=["!lm_head"], overrides={"lm_head": {"format": "nvfp4"}})
    assert model.lm_head.owner.format == "nvfp4" and "lm_head" not in quantization_of(model).ignored
    model = quantize(plain("llama"), tokens(2, 16), ignore=["*.o_proj"])
    assert {"lm_head", "model.layers.1.self_attn.o_proj"} <= quantization_of(model).ignored.keys()


def test_data_is_needed_where_any_recipe_needs_it():
    plain_rounding = dict(
        solver="rtn", transform="hadamard", weight_scale_rule="absmax", activation_scale_rule="absmax"
    )
    wc.quantize(plain("llama"), progress=False, **plain_rounding)  # reads no data
    model = plain("llama")
    model.can_generate = lambda: False
    with pytest.raises(wc.WushError, match="pass data"):
        wc.quantize(model, progress=False, **plain_rounding, overrides={"*.down_proj": {"solver": "gptq"}})
