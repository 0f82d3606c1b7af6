"""Streaming, offloading and micro-batches: the same bytes as in memory, with only one stage's weights at a time."""

import errno
import json
import os
import shutil

import pytest
import torch
from helpers import files, measured, same_tensors
from models import VOCABULARY, plain, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import wush_compile as wc
from wush_compile.calibration.activations import Activations
from wush_compile.calibration.microbatch import MAX_TOKENS, choose_batch_size, regroup
from wush_compile.calibration.streaming import CheckpointTensors, open_checkpoint
from wush_compile.capture.export import capture
from wush_compile.checkpoint.files import Shards
from wush_compile.data import normalize
from wush_compile.errors import CheckpointError, DataError, NonFiniteError
from wush_compile.passes.calibration.partition import partition

DATA = [tokens(2, 24, seed=s) for s in range(1, 5)]


def tied() -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        dtype=torch.bfloat16,
    ).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=None
        )
    ).eval()


MODELS = {"tied": tied, "gemma3": lambda: plain("gemma3"), "qwen3": lambda: plain("qwen3"), "gpt2": gpt2}


@pytest.fixture
def source(tmp_path):
    """Directory of a small Llama in several shards."""
    tied().save_pretrained(tmp_path / "source", max_shard_size="60KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    return tmp_path / "source"


def stream(source, out, data=DATA, **settings):
    return wc.quantize_checkpoint(source, data, progress=False, out=out, **settings)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("tied", {}),
        ("gemma3", dict(format="nvfp4", solver="rtn")),
        ("qwen3", dict(moments="conditional", format="int4")),
        ("gpt2", dict(solver="rtn", batch_size=4)),
        ("tied", dict(activation_format="fp8", head="int8", overrides={"*.down_proj": {"activation_format": None}})),
    ],
)
def test_streamed_files_are_those_of_the_model_in_memory(kind, settings, tmp_path):
    MODELS[kind]().save_pretrained(tmp_path / "source", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    wc.quantize(model, DATA, progress=False, out=tmp_path / "memory", **settings)
    structure = stream(tmp_path / "source", tmp_path / "streamed", **settings)
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")
    assert measured(structure) == measured(model)
    assert same_tensors(wc.load(tmp_path / "streamed"), model)
    wc.save(model, tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_text() == (tmp_path / "streamed" / name).read_text()


def test_one_stage_of_weights_at_a_time(source, tmp_path, monkeypatch):
    loads, real = [], CheckpointTensors.load
    monkeypatch.setattr(
        CheckpointTensors,
        "load",
        lambda self, names, device: (
            loads.append({name.split(".layers.")[1][0] for name in names if ".layers." in name})
            or real(self, names, device)
        ),
    )
    model = stream(source, tmp_path / "out")
    assert max(map(len, loads)) == 1 and set().union(*loads) == {"0", "1", "2"}
    # Nothing is left of what was solved, nor of the weights.
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.state_dict().values()))


def test_a_streamed_run_goes_on_from_the_journal(source, tmp_path, monkeypatch):
    from wush_compile.calibration import solve_group as solving

    real, calls = solving.solve, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(solving, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    stream(source, tmp_path / "out")
    assert len(calls) == 10 + 4
    stream(source, tmp_path / "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_without_data(source, tmp_path):
    settings = dict(solver="rtn", transform="hadamard")
    stream(source, tmp_path / "out", None, **settings)
    model = wc.quantize(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), progress=False, **settings)
    assert same_tensors(wc.load(tmp_path / "out"), model)
    with pytest.raises(DataError, match="streamed or offloaded model cannot sample"):
        stream(source, tmp_path / "other", None)
    assert not (tmp_path / "other").exists()


def test_names_with_and_without_the_prefix(source, tmp_path):
    base = tmp_path / "base"
    tied().model.save_pretrained(base)
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    model, tensors = open_checkpoint(base)
    expected = tied().state_dict()
    loaded = tensors.load(expected, torch.device("cpu"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert torch.equal(model.model.rotary_emb.inv_freq, tied().model.rotary_emb.inv_freq)


def damage(source, change):
    path = next(p for p in sorted(source.glob("*.safetensors")) if "model.layers.1.mlp.up_proj.weight" in load_file(p))
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda s: s["model.layers.1.mlp.up_proj.weight"].view(-1)[5:6].fill_(torch.nan),
            NonFiniteError,
            "layers.1.mlp.up_proj",
        ),
        (
            lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
            CheckpointError,
            "no tensor for model.layers.1.mlp.up_proj",
        ),
        (lambda s: s.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 64)}), CheckpointError, "config.json"),
    ],
)
def test_damaged_weights_are_named(source, tmp_path, change, error, message):
    damage(source, change)
    with pytest.raises(error, match=message):
        stream(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_streamed(source, tmp_path):
    with pytest.raises(CheckpointError, match="local model"):
        stream("somebody/model", tmp_path / "out")
    stream(source, tmp_path / "out", solver="rtn")
    with pytest.raises(CheckpointError, match="already quantized"):
        stream(tmp_path / "out", tmp_path / "again")
    shutil.copytree(source, tmp_path / "cut")
    path = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        stream(tmp_path / "cut", tmp_path / "other")


# -- activations and micro-batches -----------------------------------------------------------------------------------


def test_activations_in_files(tmp_path):
    one = wc.quantize(plain("llama"), DATA, progress=False)
    two = wc.quantize(plain("llama"), DATA, progress=False, activations_dir=tmp_path)
    assert same_tensors(one, two) and not list(tmp_path.iterdir())


def test_activations_that_find_no_room(tmp_path, monkeypatch):
    with pytest.raises(wc.WushError, match="there is no directory .*nowhere"):
        wc.quantize(plain("llama"), DATA[:1], progress=False, activations_dir=tmp_path / "nowhere")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(wc.WushError, match="No space left"):
        Activations([{}], torch.device("cpu"), True, tmp_path).write(0, {"x": torch.ones(3)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("directory", [False, True])
def test_offloaded_values_come_back(directory, tmp_path):
    x = torch.randn(3, 5).to(torch.bfloat16)
    repeated, transposed = torch.arange(4)[None, None].expand(6, 1, 4), torch.randn(4, 3).T
    kept = Activations([{}, {}], torch.device("cpu"), True, tmp_path if directory else None)
    kept.write(0, {"x": x, "repeated": repeated, "transposed": transposed, "n": 7, "empty": x[:0]})
    kept.write(1, {"x": x + 1})
    ([a, b, c, n, empty],) = [next(kept.read(["x", "repeated", "transposed", "n", "empty"]))]
    assert torch.equal(a, x) and torch.equal(b, repeated) and torch.equal(c, transposed) and n == 7
    assert empty.shape == (0, 5) and empty.dtype == torch.bfloat16
    assert kept._values[0]["repeated"].tensor.numel() == 4
    assert [torch.equal(v, x + i) for i, (v,) in enumerate(kept.read(["x"]))] == [True, True]
    kept.drop(0, ["x"])
    assert "x" not in kept.names(0)


def test_regrouped_batches_hold_the_same_sequences():
    batches = [{"input_ids": tokens(3, 8, 1)}, {"input_ids": tokens(2, 8, 2)}, {"input_ids": tokens(1, 5, 3)}]
    rows = [row for b in batches for row in b["input_ids"].tolist()]
    for size in (1, 2, 4, 9):
        grouped = regroup(batches, size)
        assert [row for g in grouped for row in g.inputs["input_ids"].tolist()] == rows
        assert max(len(g.inputs["input_ids"]) for g in grouped) == min(size, 5)
    assert [str(g) for g in regroup(batches, 4)] == ["one of the batches 0 to 1", "batch 1", "batch 2"]
    assert [g.tokens() for g in regroup(batches, None)] == [24, 16, 5]
    odd = [(torch.randn(4, 3),), {"input_ids": tokens(2, 8), "position_ids": torch.arange(8)[None]}]
    assert [g.inputs is b for g, b in zip(regroup(odd, 1), odd, strict=True)] == [True, True]


def test_the_micro_batch_follows_free_memory(monkeypatch):
    model = plain("llama")
    batches = normalize([tokens(64, 32)], model=model)
    captured = capture(model, batches)
    stages, placeholders = partition(captured.graph_module), captured.placeholders()

    def chosen(free, batches=batches, device="cuda"):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
        return choose_batch_size(batches, stages, placeholders, torch.device(device))

    assert chosen(2**40) == 64 and chosen(1) == 1
    assert chosen(2**40, normalize([tokens(99, 32)] * 9, model=model)) == MAX_TOKENS // 32
    sizes = [chosen(free * 2**16) for free in range(1, 200)]
    assert sizes == sorted(sizes) and set(sizes) == {1, 2, 4, 8, 16, 32, 64}
    assert chosen(2**21) == chosen(2**20) * 2
    assert chosen(2**40, device="cpu") is None and chosen(2**40, [(torch.randn(4, 3),)]) is None


def test_micro_batches_are_batches_of_that_size():
    rows = [row[None] for batch in DATA for row in batch]
    one = wc.quantize(plain("llama"), DATA, progress=False, batch_size=4)
    two = wc.quantize(plain("llama"), [torch.cat(rows[:4]), torch.cat(rows[4:])], progress=False)
    assert same_tensors(one, two)


def test_shards_keep_no_file_open(source):
    shards = Shards(sorted(source.glob("*.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = shards.tensor(name)
    for path in source.glob("*.safetensors"):
        path.write_bytes(b"")
    assert torch.equal(tensor, tied().state_dict()[name])


@pytest.mark.gpu
def test_beside_a_gpu_is_on_the_gpu(source, tmp_path):
    resident = wc.quantize(tied().cuda(), DATA, progress=False, batch_size=4)
    beside = wc.quantize(tied(), DATA, progress=False, batch_size=4, device="cuda")
    assert same_tensors(resident.cpu(), beside) and not next(beside.parameters()).is_cuda
    stream(source, tmp_path / "out", batch_size=4, device="cuda")
    assert same_tensors(wc.load(tmp_path / "out"), beside)
