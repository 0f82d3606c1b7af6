"""Models by name: of the class that config.json names, whole, or not at all."""

import json

import pytest
import torch
import transformers
from helpers import quantize
from safetensors.torch import load_file, save_file

import wush_compile as wc
from wush_compile.checkpoint.source import empty_model
from wush_compile.errors import CheckpointError, ConfigError, WushError
from wush_compile.modules import is_quantized

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def bert():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


def llama():
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def edit(directory, change):
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_the_class_is_that_of_the_configuration(tmp_path):
    torch.manual_seed(0)
    model = bert()
    model.save_pretrained(tmp_path / "m")
    loaded, tokenizer = wc.load_model(tmp_path / "m")
    assert type(loaded) is type(model) and tokenizer is None
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert type(empty_model(tmp_path / "m", torch.float32)) is type(model)
    for out in (tmp_path / "a", tmp_path / "b"):
        one = wc.quantize_checkpoint if out.name == "a" else wc.quantize
        one(tmp_path / "m", [IDS], solver="rtn", progress=False, out=out)
    a, b = (wc.load(tmp_path / name) for name in "ab")
    assert type(a) is type(model) and torch.equal(a(IDS).logits, b(IDS).logits)
    assert torch.equal(a.classifier.weight, model.classifier.weight) or is_quantized(a.classifier)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("classifier.bias"), "lacks the weights of a BertForSequenceClassification: classifier.bias"),
        (lambda t: t.update({"cls.bias": torch.ones(3)}), "besides the weights of a Bert.*: cls.bias"),
    ],
)
def test_missing_and_left_over_weights_are_errors(tmp_path, change, message):
    bert().save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        wc.load_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match="no tensor for classifier.bias|besides the weights"):
        wc.quantize_checkpoint(tmp_path / "m", [IDS], out=tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_what_transformers_ignores_is_no_left_over_weight(tmp_path):
    llama().save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    wc.load_model(tmp_path / "m")
    wc.quantize_checkpoint(tmp_path / "m", [IDS], out=tmp_path / "c", progress=False, solver="rtn")
    assert is_quantized(wc.load(tmp_path / "c"))


def test_sources_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match="there is no directory .*none"):
        wc.load_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no config.json"):
        wc.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the configuration"):
        wc.load_model(tmp_path)
    config = {"model_type": "bert", "architectures": ["HomeMade"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    with pytest.raises(CheckpointError, match="has HomeMade, which transformers .* does not have"):
        wc.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="cannot load the weights"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
        wc.load_model(tmp_path)


def test_quantize_takes_a_name(tmp_path):
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "m")
    by_name = wc.quantize(str(tmp_path / "m"), [IDS], progress=False, solver="rtn")
    assert torch.equal(by_name(IDS).logits, quantize(model, IDS)(IDS).logits)
    wc.save(by_name, tmp_path / "c")
    with pytest.raises(WushError, match="already quantized"):
        wc.quantize(tmp_path / "c", [IDS], progress=False)


# -- load: where to, and as what -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = quantize(llama(), IDS)
    directory = tmp_path_factory.mktemp("load") / "m"
    wc.save(model, directory)
    return model, directory


def test_load_takes_device_dtype_and_device_map(saved):
    model, directory = saved
    for settings in ({"device": "cpu"}, {"device": torch.device("cpu")}, {"device_map": {"": "cpu"}}):
        assert torch.equal(wc.load(directory, **settings)(IDS).logits, model(IDS).logits)
    half = wc.load(directory, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.lm_head.weight.dtype == torch.bfloat16
    group, same = (next(m for m in each.modules() if hasattr(m, "weight_packed")) for each in (half, model))
    assert group.input_transform.dtype == same.input_transform.dtype
    skeleton = wc.load(directory, model=llama(), device="cpu", dtype=torch.bfloat16)
    assert torch.equal(skeleton.model.norm.weight, half.model.norm.weight)
    with pytest.raises(ConfigError, match="give one of them"):
        wc.load(directory, device="cpu", device_map="auto")
    with pytest.raises(ConfigError, match="device_map is for Hugging Face models"):
        wc.load(directory, model=llama(), device_map="auto")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}])
def test_variants(saved, tmp_path, shards):
    model, _ = saved
    model.save_pretrained(tmp_path, variant="w4", **shards)
    assert not list(tmp_path.glob("model.safetensors"))
    for loaded in (wc.load(tmp_path, variant="w4"), type(model).from_pretrained(tmp_path, variant="w4")):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        wc.load(tmp_path)
