"""The command line and the demonstration, on a tiny random model with a byte tokenizer."""

import json
import re
import shutil

import pytest
import torch
from helpers import files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import wush_compile as wc
from wush_compile.cli import app

TEXT = "It is a truth universally acknowledged, that a test in possession of a model, must be in want of a text. " * 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(directory of a model and its tokenizer, text file)."""
    directory = tmp_path_factory.mktemp("tiny")
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        bos_token_id=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    text = directory / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return directory, text


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    model, text = tiny
    out = tmp_path_factory.mktemp("out") / "checkpoint"
    output = run(
        "quantize",
        model,
        "--calibration",
        text,
        "--out",
        out,
        "--window",
        64,
        "--format",
        "nvfp4",
        "--solver",
        "rtn",
        "--ignore",
        "lm_head",
        "--ignore",
        "*.o_proj",
        "--device",
        "cpu",
    )
    return out, output


def test_quantize(quantized):
    out, output = quantized
    assert "12 linears in 6 groups" in output and "2: ignored by the configuration ('*.o_proj'): model" in output
    record = wc.load(out).wush_quantization
    assert record.config == wc.WushConfig(format="nvfp4", solver="rtn", ignore=("lm_head", "*.o_proj"))


def test_quantize_goes_on_streams_and_logs(tiny, tmp_path):
    model, text = tiny
    same = ("--calibration", text, "--window", 64, "--count", 4, "--solver", "rtn", "--device", "cpu")
    output = run("quantize", model, "--out", tmp_path / "a", *same)
    lines = [line.split()[0] for line in output.splitlines() if line.strip().startswith("model.layers")]
    assert len(lines) == 8 and "relative" in output  # the table of groups
    log = tmp_path / "log.jsonl"
    assert run("quantize", model, "--out", tmp_path / "b", *same, "--stream", "--quiet", "--log", log) == ""
    assert files(tmp_path / "a") == files(tmp_path / "b") and (tmp_path / "a" / "tokenizer.json").exists()
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "finished"
    run("quantize", model, "--out", tmp_path / "b", *same, "--quiet")  # finished: nothing to do
    changed = ("quantize", model, "--out", tmp_path / "b", *same, "--format", "nvfp4", "--quiet")
    assert "format 'mxfp4', not 'nvfp4'" in run(*changed, code=1)
    run(*changed, "--restart")
    assert wc.load(tmp_path / "b").wush_quantization.config.format == "nvfp4"


def test_fewer_windows_than_asked_for_is_a_warning(tiny, tmp_path):
    model, text = tiny
    options = ["--calibration", text, "--out", tmp_path / "a", "--solver", "rtn", "--quiet"]
    result = CliRunner().invoke(app, [str(a) for a in ("quantize", model, *options)])
    assert f"has {len(TEXT) // 512} calibration windows of 512 tokens, not 128" in " ".join(result.stderr.split())
    record = wc.load(tmp_path / "a").wush_quantization
    assert record.run["calibration"] == {"windows": 2, "tokens": 1024, "first_token": None}


def test_evaluate(tiny, quantized):
    model, text = tiny
    output = run(
        "evaluate", quantized[0], "--text", text, "--reference", model, "--window", 64, "--device", "cpu", "--save"
    )
    assert json.loads((quantized[0] / "wush_evaluation.json").read_text())["text"] == "text.txt"
    kl = float(re.search(r"(\d\.\d{4})", output).group(1))
    assert 0 < kl < 0.1 and "top-1" in output  # measured: .0018
    windows = len(TEXT) // 64
    assert f"{windows} windows of 64 tokens, {windows * 64} of the text's; no BOS" in output
    assert float(re.search(r"(\d+\.\d{3})", run("evaluate", model, "--text", text, "--window", 64)).group(1)) > 100


def test_windows_begin_with_the_bos_of_the_tokenizer(tiny, tmp_path):
    model, text = tiny
    with_bos = tmp_path / "model"
    shutil.copytree(model, with_bos)
    tokenizer = json.loads((with_bos / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    bos = tokenizer["model"]["vocab"]["!"]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"!": {"id": "!", "ids": [bos], "tokens": ["!"]}},
    }
    (with_bos / "tokenizer.json").write_text(json.dumps(tokenizer))
    options = ("--text", text, "--window", 64, "--device", "cpu")
    output = run("evaluate", with_bos, *options)
    windows = len(TEXT) // 63
    assert f"{windows} windows of 64 tokens, {windows * 63} of the text's; each begins with !" in output
    assert run("evaluate", with_bos, *options, "--no-bos").replace(str(with_bos), str(model)) != output
    for option, first in (("--bos", bos), ("--no-bos", None)):
        same = ("--calibration", text, "--window", 64, "--solver", "rtn", "--device", "cpu", "--quiet", "--restart")
        run("quantize", with_bos, "--out", tmp_path / "out", *same, option)
        record = wc.load(tmp_path / "out").wush_quantization
        assert record.run["calibration"]["first_token"] == first
    output = run("evaluate", tmp_path / "out", *options, "--save")
    saved = json.loads((tmp_path / "out" / "wush_evaluation.json").read_text())
    assert saved["prefix"] == [bos] and saved["tokens"] == windows * 63


def test_explain_and_generate(quantized):
    short, everything = run("explain", quantized[0]), run("explain", quantized[0], "--all")
    assert "wush.fp4_linear" not in short and "wush.fp4_linear" in everything
    assert len(short.splitlines()) < 50 and "6 groups, largest relative loss first" in short
    output = run("generate", quantized[0], "--prompt", "It is", "--tokens", 4, "--device", "cpu")
    assert output.startswith("It is")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("explain", "{empty}"), "config.json"),
        (("generate", "{model}/text.txt", "--prompt", "a"), "GGUF"),
        (("explain", "{model}"), "wush"),
        (("quantize", "{model}", "--out", "{empty}/x", "--format", "mxpf4"), "did you mean 'mxfp4'"),
        (("quantize", "{model}", "--calibration", "{model}/none.txt", "--out", "{empty}/x"), "none.txt"),
        (
            (
                "quantize",
                "{model}",
                "--calibration",
                "{model}/text.txt",
                "--window",
                "9999",
                "--out",
                "{empty}/x",
                "--quiet",
            ),
            "shorter windows",
        ),
        (("quantize", "{model}", "--out", "{empty}/x", "--stream"), "pass data"),
        (("quantize", "some/model", "--out", "{empty}/x", "--stream"), "download it first"),
        (("quantize", "{model}/nowhere", "--out", "{empty}/x"), "there is no directory"),
        (("quantize", "{model}", "--out", "{empty}/x", "--activations-dir", "{empty}/none"), "there is no directory"),
        (("quantize", "{model}", "--out", "{empty}/x", "--device", "gpu"), "this machine has cpu"),
        (("quantize", "{model}", "--out", "{empty}/x", "--device", "meta"), "this machine has cpu"),
        (("evaluate", "{model}", "--text", "{model}/model.safetensors"), "is not text in UTF-8"),
        (("quantize", "{model}", "--out", "{empty}/x", "--calibration", "{model}/model.safetensors"), "UTF-8"),
        (("evaluate", "{model}", "--text", "/dev/null"), "give at least 2"),
        (("generate", "{model}", "--prompt", ""), "--prompt is empty"),
        (("evaluate", "{empty}", "--text", "{model}/text.txt"), "no config.json"),
    ],
)
def test_errors_are_one_line(tiny, tmp_path, arguments, message):
    error = run(*(a.format(model=tiny[0], empty=tmp_path) for a in arguments), code=1)
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{model}", "--prompt", "a", "--tokens", 0),
        ("evaluate", "{model}", "--text", "{model}/text.txt", "--window", 0),
        ("quantize", "{model}", "--out", "{empty}/x", "--window", 0),
    ],
)
def test_numbers_out_of_range_are_usage_errors(tiny, tmp_path, arguments):
    error = run(*(str(a).format(model=tiny[0], empty=tmp_path) for a in arguments), code=2)
    assert arguments[-2] in error and "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "quantize", "evaluate", "explain", "report", "generate"])
def test_help(command):
    assert "--help" in run(command, "--help")


def test_version_and_the_default_of_ignore():
    assert run("--version") == f"wush-compile {wc.__version__}\n"
    assert "[default: (lm_head)]" in " ".join(run("quantize", "--help").replace("│", " ").split())


def test_demo(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wush_compile.demo import run as demo
    from wush_compile.demo import smollm2

    model, _ = tiny
    monkeypatch.setattr(
        smollm2,
        "load",
        lambda: (AutoModelForCausalLM.from_pretrained(model, dtype="auto"), AutoTokenizer.from_pretrained(model)),
    )
    monkeypatch.setattr(demo, "WINDOW", 32)
    monkeypatch.setattr(demo, "CALIBRATION_WINDOWS", 4)
    monkeypatch.setattr(demo, "EVALUATION_WINDOWS", 2)
    output = run("demo", "--out", tmp_path / "model")
    for part in ("bf16", "RTN identity", "RTN Hadamard", "GPTQ WUSH", "KL to bf16", "MiB", "wc.load"):
        assert part in output, part
    assert wc.load(tmp_path / "model").wush_quantization.config == wc.WushConfig()


def test_doctor():
    output = " ".join(run("doctor", "--device", "cpu").split())
    assert "torch" in output and "reference" in output and "fp4_linear" in output and "checks passed" in output


def test_bits_are_chosen(tiny, tmp_path):
    model, text = tiny
    given = ("quantize", model, "--calibration", text, "--out", tmp_path / "out", "--window", 64, "--device", "cpu")
    table = run(*given, "--recommend", "--max-share", 0.8, "--cost", "h100:1")
    assert "predicted KL" in table and "model.layers.1.mlp.gate_proj+up_proj" in table
    assert not (tmp_path / "out").exists()
    output = run(*given, "--max-share", 0.8, "--cost", "h100:1")
    rungs = dict(re.findall(r"^ (\S+) +\d+ x \d+ +(W\d+A\d+)", table, re.MULTILINE))
    assert len(rungs) == 8 and table.strip() in output
    groups = {
        g["members"][0]
        for g in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["groups"]
    }
    assert groups == {name.partition("+")[0] for name, rung in rungs.items() if rung != "W16A16"}
    assert "GPU:ROWS" in run(*given, "--recommend", "--cost", "h100:many", code=1)
    assert "--calibration" in run("quantize", model, "--out", tmp_path / "x", "--recommend", "--device", "cpu", code=1)
