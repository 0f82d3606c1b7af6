"""Hugging Face models: from_pretrained and save_pretrained, exactly; offloading; refusals."""

import copy
import importlib
import json
import os

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from helpers import files, quantize, same_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import wush_compile as wc
from wush_compile.checkpoint import hf
from wush_compile.checkpoint.record import ATTRIBUTE
from wush_compile.errors import CheckpointError
from wush_compile.modules import WushLinear, named_groups

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=97,
            tie_word_embeddings=True,
        )
    )


def qwen2():  # q, k, v have biases, o has none
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=97,
            tie_word_embeddings=False,
        )
    )


def gpt2():  # Conv1D: weights are [K, N]
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=97, bos_token_id=1, eos_token_id=2)
    )


def bert():
    return transformers.BertModel(_bert())


def classifier():
    return transformers.BertForSequenceClassification(_bert())


def _bert():
    return transformers.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=97
    )


MODELS = {
    "llama": (llama, AutoModelForCausalLM, {"format": "nvfp4"}),
    "qwen2": (qwen2, AutoModelForCausalLM, {"format": "mxfp4", "transform_block_size": 64}),
    "gpt2": (gpt2, AutoModelForCausalLM, {"format": "int4", "transform": "hadamard"}),
    "bert": (bert, AutoModel, {"format": "mxfp4", "share_transform": False}),
    "classifier": (classifier, AutoModelForSequenceClassification, {"format": "nvfp4", "transform": "identity"}),
}


def build(name: str):
    make, _, settings = MODELS[name]
    torch.manual_seed(0)
    return quantize(make().eval(), IDS, **settings)


@pytest.fixture(scope="module")
def models():
    made = {}
    return lambda name: copy.deepcopy(made.setdefault(name, build(name) if name not in made else None) or made[name])


@pytest.fixture
def saved(models, tmp_path):
    """(quantized tied Llama, its checkpoint)."""
    model = models("llama")
    wc.save(model, tmp_path / "saved")
    return model, tmp_path / "saved"


@torch.no_grad()
def outputs(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    result = model(input_ids=ids)
    return result[0]


# -- what comes back -------------------------------------------------------------------------------------------------


def without_report(files: dict[str, str]) -> dict[str, str]:
    """What transformers' own `save_pretrained` writes: it does not know the report."""
    return {name: sha for name, sha in files.items() if name != "wush_report.json"}


@pytest.mark.parametrize("name", MODELS)
def test_reload_is_exact_and_saves_the_same_bytes(models, tmp_path, name):
    model, auto = models(name), MODELS[name][1]
    assert sum(isinstance(m, WushLinear) for m in model.modules()) >= 4
    wc.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    one, two = wc.load(tmp_path / "a"), auto.from_pretrained(tmp_path / "a")
    for loaded in (one, two):
        assert type(loaded) is type(model) and not loaded.training
        assert same_tensors(model, loaded)
        assert torch.equal(outputs(model), outputs(loaded))
        own = dict(model.named_modules())
        for name, m in loaded.named_modules():
            if isinstance(m, WushLinear):  # `weight` and `bias` are answered, and are no tensors of the checkpoint
                assert torch.equal(m.weight, m.dequantize().to(m.weight.dtype)) and not m._parameters
                assert m.weight.dtype == own[name].weight.dtype and (m.bias is None) == (own[name].bias is None)
        record, again = getattr(model, ATTRIBUTE), getattr(loaded, ATTRIBUTE)
        assert (record.config, record.groups, record.ignored) == (again.config, again.groups, again.ignored)
    wc.save(one, tmp_path / "c")
    two.save_pretrained(tmp_path / "d")
    wc.save(copy.deepcopy(two), tmp_path / "e")
    written = files(tmp_path / "a")
    for again in "bcde":
        assert files(tmp_path / again) == (written if again in "ce" else without_report(written)), again


def test_names_on_disk(models, tmp_path):
    model = models("qwen2")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    layer, attention, mlp = "model.layers.0", "model.layers.0.self_attn", "model.layers.0.mlp"
    linears = [*(f"{attention}.{n}_proj" for n in "qkvo"), *(f"{mlp}.{n}_proj" for n in ("gate", "up", "down"))]
    assert names == {
        *(f"{m}.{t}" for m in linears for t in ("weight_packed", "weight_scale", "weight_global_scale")),
        *(f"{attention}.{n}_proj.bias" for n in "qkv"),
        *(f"{linears[i]}.{name}" for i in (0, 3, 4, 6) for name in ("input_transform", "input_feedback")),
        f"{layer}.input_layernorm.weight",
        f"{layer}.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(settings) == {"quant_method", "format_version", "config", "groups", "ignored"}
    assert {tuple(g) for g in settings["groups"]} == {("members", "recipe", "transform_block_size")}
    assert settings["groups"][-1] == {"members": [f"{mlp}.down_proj"], "transform_block_size": 32, "recipe": {}}


def test_tied_embeddings(saved):
    model, directory = saved
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = wc.load(directory)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_generate(saved):
    model, directory = saved
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **settings)
    assert expected.shape == (2, 20)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(loaded.generate(IDS, **settings), expected)
    assert loaded.hf_quantizer.is_compileable and loaded.hf_quantizer.is_trainable


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_the_model_is_kept(tmp_path, monkeypatch, dtype):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(llama(1).config, dtype=dtype).eval()
    quantize(model, IDS)
    wc.save(model, tmp_path / "a")
    for loaded in (wc.load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "a")):
        assert loaded.dtype == dtype and same_tensors(model, loaded)
        assert torch.equal(outputs(model), outputs(loaded))
    # Modules that transformers keeps in fp32 are quantized too: their buffers stay what they are.
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"o_proj"})
    assert same_tensors(model, wc.load(tmp_path / "a"))
    assert same_tensors(model, AutoModelForCausalLM.from_pretrained(tmp_path / "a"))


def test_another_dtype_leaves_groups_as_they_are(saved):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert loaded.model.norm.weight.dtype == torch.bfloat16 and outputs(loaded).dtype == torch.bfloat16
    for (_, group), (_, own) in zip(named_groups(loaded), named_groups(model), strict=True):
        assert same_tensors(group, own)


def test_mixed_dtypes(models, tmp_path):
    model = models("llama")
    model.model.norm.weight.data = model.model.norm.weight.data.to(torch.bfloat16)
    wc.save(model, tmp_path / "a")
    loaded = wc.load(tmp_path / "a")
    assert loaded.model.norm.weight.dtype == torch.bfloat16 and same_tensors(model, loaded)


def test_shards(models, tmp_path):
    model = models("llama")
    model.save_pretrained(tmp_path / "a", max_shard_size="3KB")
    shards = [f for f in os.listdir(tmp_path / "a") if f.endswith(".safetensors")]
    assert len(shards) > 3
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    attention = "model.layers.0.self_attn"
    assert len({index[f"{attention}.{n}_proj.weight_packed"] for n in "qkv"}) > 1
    loaded = wc.load(tmp_path / "a")
    assert same_tensors(model, loaded) and torch.equal(outputs(model), outputs(loaded))
    loaded.save_pretrained(tmp_path / "b", max_shard_size="3KB")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    wc.save(loaded, tmp_path / "a")  # shards of the old save do not stay
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert same_tensors(model, wc.load(tmp_path / "a"))
    (tmp_path / "b" / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0]} is missing"):
        wc.load(tmp_path / "b")


def test_skeleton(saved):
    model, directory = saved
    loaded = wc.load(directory, model=llama().eval())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same_tensors(model, loaded) and torch.equal(outputs(model), outputs(loaded))
    wc.save(loaded, directory.parent / "b")
    names = ("config.json", "model.safetensors")
    assert [files(directory)[n] for n in names] == [files(directory.parent / "b")[n] for n in names]


def test_save_pretrained_into_the_directory_it_came_from(saved):
    model, directory = saved
    expected = files(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    wc.save(loaded, directory)
    assert files(directory) == expected and same_tensors(model, loaded)


def test_renamings_of_the_loaded_model_do_not_reach_the_names(saved, tmp_path):
    # A GGUF or an older checkpoint leaves conversions behind, which transformers would apply backwards when it saves.
    model, directory = saved
    from transformers.core_model_loading import WeightRenaming

    model._weight_conversions = [WeightRenaming("embedding", "embed_tokens")]
    hf.attach(model, getattr(model, ATTRIBUTE))
    model.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "b") == without_report(files(directory))


def test_tokenizer(models, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")), unk_token="?"
    )
    wc.save(models("llama"), tmp_path / "a", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again.get_vocab() == tokenizer.get_vocab()


# -- devices ---------------------------------------------------------------------------------------------------------


def test_device_map_cpu(saved, tmp_path):
    model, directory = saved
    loaded = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    assert same_tensors(model, loaded) and torch.equal(outputs(model), outputs(loaded))
    loaded.save_pretrained(tmp_path / "b")
    assert files(tmp_path / "b") == without_report(files(directory))


def test_device_map_disk(saved, tmp_path):
    model, directory = saved
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=device_map, offload_folder=tmp_path / "o", offload_buffers=True
    )
    assert loaded.model.layers[1].mlp.gate_proj.group.weight_packed.is_meta
    assert torch.equal(outputs(model), outputs(loaded))
    with pytest.warns(UserWarning, match="offloaded"):
        wc.save(loaded, tmp_path / "b")
    assert files(tmp_path / "b") == files(directory)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_accelerate_offload(models, tmp_path, offload):
    model = models("qwen2")
    expected = outputs(model)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    else:
        disk_offload(model, tmp_path / "o", execution_device=torch.device("cpu"), offload_buffers=True)
    assert all(t.is_meta for _, group in named_groups(model) for t in group.buffers())
    assert torch.equal(outputs(model), expected)


# -- refusals --------------------------------------------------------------------------------------------------------


def truncate(directory):
    with open(directory / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(directory / "model.safetensors") - 100)


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    for key, value in changes.items():
        target = config["quantization_config"] if key in config["quantization_config"] else config
        target[key] = value
    (directory / "config.json").write_text(json.dumps(config))


def edit_weights(directory, change):
    tensors = {k: v.clone() for k, v in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "truncated": (truncate, "truncated or damaged"),
    "tampered": (lambda d: edit_weights(d, lambda t: t["model.norm.weight"].mul_(2)), "not those that were saved"),
    "missing": (lambda d: edit_weights(d, lambda t: t.pop(f"{Q}.weight_scale")), f"lacks {Q}.weight_scale"),
    "left over": (lambda d: edit_weights(d, lambda t: t.update({f"{Q}.weight": torch.ones(2)})), f"no {Q}.weight"),
    "wrong shape": (lambda d: edit_weights(d, lambda t: t.update({"model.norm.weight": torch.ones(63)})), "has shape"),
    "newer": (lambda d: edit_config(d, format_version=7), "format_version 7.*upgrade"),
    "another width": (lambda d: edit_config(d, intermediate_size=128), "load it into the kind of model"),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=1), r"quantizes 'model.layers.1.*does not have"),
    "no digest": (lambda d: edit_config(d, wush_sha256=None), "has no wush_sha256"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(saved, name):
    damage, message = DAMAGE[name]
    _, directory = saved
    damage(directory)
    for read in (wc.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=message):
            read(directory)


def test_other_refusals(saved, tmp_path):
    model, directory = saved
    edit_config(directory, architectures=["HomeMadeLM"])
    with pytest.raises(CheckpointError, match="HomeMadeLM, which transformers does not have"):
        wc.load(directory)
    llama().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="not a wush checkpoint"):
        wc.load(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="empty it first"):
        wc.save(model, tmp_path / "plain")
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").lm_head, torch.nn.Linear)


def test_registering_twice(saved):
    """A reloaded file replaces its classes in transformers' tables, and checkpoints load with the new ones."""
    model, directory = saved
    for _ in range(2):
        old = hf.WushHfConfig, hf.WushHfQuantizer
        importlib.reload(hf)
        loaded = AutoModelForCausalLM.from_pretrained(directory)
        used = type(loaded.config.quantization_config), type(loaded.hf_quantizer)
        assert used == (hf.WushHfConfig, hf.WushHfQuantizer) and used != old
        assert torch.equal(outputs(loaded), outputs(model))
