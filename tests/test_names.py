"""Names in a checkpoint follow the model: another head when loading, a model that has changed when saving."""

import copy
import json

import pytest
import torch
import transformers
from helpers import Branches, quantize
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import wush_compile as wc
from wush_compile.checkpoint.record import ATTRIBUTE
from wush_compile.errors import CheckpointError, WushError
from wush_compile.modules import WushLinear, is_quantized

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
SMALL = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, vocab_size=97)


def llama(layers=1, **settings):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SMALL, **settings)).eval()


def llava():
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(num_hidden_layers=1, **SMALL),
        image_token_id=96,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def states(model):
    with torch.no_grad():
        return model(IDS).last_hidden_state


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with a quantized head, and its checkpoint."""
    model = quantize(llama(), IDS, ignore=("!lm_head",))
    directory = tmp_path_factory.mktemp("names") / "whole"
    wc.save(model, directory)
    return model, directory


# -- loading -------------------------------------------------------------------------------------------------------


def test_the_base_model_of_a_checkpoint(whole, tmp_path):
    model, directory = whole
    base = AutoModel.from_pretrained(directory)
    assert torch.equal(states(base), states(model.model))
    record = base.wush_quantization
    assert record.groups[0]["members"][0] == "layers.0.self_attn.q_proj" and "embed_tokens" in record.ignored
    assert not any("lm_head" in name for group in record.groups for name in group["members"])
    assert set(record.report) == {group["members"][0] for group in record.groups}
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(states(wc.load(tmp_path / "base")), states(base))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # with a new head
    assert torch.equal(states(again.model), states(base)) and not isinstance(again.lm_head, WushLinear)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(wc.load(tmp_path / "again")), logits(again))


def test_another_head(whole, tmp_path):
    model, directory = whole
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
    assert torch.equal(states(classifier.model), states(model.model)) and classifier.score.out_features == 3
    wc.save(classifier, tmp_path / "classifier")
    ids = IDS[:1]
    assert torch.equal(wc.load(tmp_path / "classifier")(ids).logits, classifier(ids).logits)


def test_the_encoder_of_an_encoder_decoder(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=97, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    model = quantize(transformers.T5ForConditionalGeneration(config).eval(), IDS)
    wc.save(model, tmp_path / "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    assert torch.equal(states(encoder), states(model.encoder))


def test_the_same_base_without_a_part(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = quantize(transformers.BertForSequenceClassification(config).eval(), IDS)  # with a pooler
    wc.save(model, tmp_path / "bert")
    masked = transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert")  # without one
    assert torch.equal(states(masked.bert), states(model.bert))


# -- saving --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [wc.save, lambda model, directory: model.save_pretrained(directory)])
def test_a_model_whose_submodule_was_quantized(tmp_path, save):
    model = llava()
    quantize(model.model.language_model, IDS)
    before = logits(model)
    with pytest.raises(WushError, match="only model.language_model of this LlavaForCond"):
        wc.explain(model)
    save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "quantization_config" in config and "quantization_config" not in config["text_config"]
    for loaded in (wc.load(tmp_path / "a"), type(model).from_pretrained(tmp_path / "a")):
        assert torch.equal(logits(loaded), before)
    record = model.wush_quantization
    assert record.groups[0]["members"][0] == "model.language_model.layers.0.self_attn.q_proj"
    assert set(record.report) <= {group["members"][0] for group in record.groups} and record.report
    assert "outside of model.language_model" in record.ignored["lm_head"]
    assert "q_proj" in wc.explain(model)
    inner = model.model.language_model  # saved alone, it has the names that it had alone
    save(inner, tmp_path / "b")
    assert torch.equal(states(wc.load(tmp_path / "b")), states(inner))
    save(model, tmp_path / "a")
    assert torch.equal(logits(wc.load(tmp_path / "a")), before)


def test_two_submodules_with_the_same_names_and_other_recipes(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(5, 7, 64)
    model = nn.ModuleDict({"a": Branches(), "b": Branches()})
    quantize(model["a"], x)
    quantize(model["b"], x, format="nvfp4")
    wc.save(model, tmp_path / "m")
    loaded = wc.load(tmp_path / "m", model=nn.ModuleDict({"a": Branches(), "b": Branches()}))
    for name in ("a", "b"):
        assert torch.equal(loaded[name](x), model[name](x))
    assert [g["recipe"] for g in loaded.wush_quantization.groups] == [{}, {}, *[{"format": "nvfp4"}] * 2]


@pytest.fixture(scope="module")
def deep():
    return quantize(llama(layers=3), IDS)


def test_a_dropped_layer(deep, tmp_path):
    model = copy.deepcopy(deep)
    del model.model.layers[1]
    with pytest.raises(CheckpointError, match="lacks model.layers.2.*num_hidden_layers"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()
    model.config.num_hidden_layers = 2
    for save in (wc.save, lambda model, directory: model.save_pretrained(directory)):
        save(model, tmp_path / "m")
        loaded = wc.load(tmp_path / "m")
        assert torch.equal(logits(loaded), logits(model)) and len(loaded.model.layers) == 2
    losses = deep.wush_quantization.report
    assert loaded.wush_quantization.groups == model.wush_quantization.groups
    wc.save(model, tmp_path / "m")
    reported = wc.load(tmp_path / "m").wush_quantization.report
    assert reported["model.layers.1.self_attn.q_proj"] == losses["model.layers.2.self_attn.q_proj"]


def test_a_part_of_a_group_that_is_gone(deep, tmp_path):
    for lost in ("q_proj", "v_proj"):
        model = copy.deepcopy(deep)
        setattr(model.model.layers[0].self_attn, lost, nn.Linear(64, 64))
        for save in (wc.save, lambda model, directory: model.save_pretrained(directory)):
            with pytest.raises(CheckpointError, match=f"{lost} left the model"):
                save(model, tmp_path / "m")
    assert not (tmp_path / "m" / "config.json").exists()


def test_an_unchanged_record_stays_the_same_object(deep, tmp_path):
    record = getattr(deep, ATTRIBUTE)
    wc.save(deep, tmp_path / "a")
    wc.save(torch.compile(deep), tmp_path / "b")
    assert getattr(deep, ATTRIBUTE) is record
    assert all((tmp_path / "a" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "b").iterdir())


def test_a_model_with_an_adapter_is_refused(deep, tmp_path):
    model = copy.deepcopy(deep)
    model._hf_peft_config_loaded = True  # as add_adapter sets it
    with pytest.raises(CheckpointError, match="has an adapter"):
        wc.save(model, tmp_path / "m")


def test_an_unquantized_model_saves_as_ever(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "m")
    assert "transformers_weights" not in (tmp_path / "m" / "config.json").read_text()
    assert not is_quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    with pytest.raises(WushError, match="is not quantized"):
        wc.save(model, tmp_path / "n")
