"""A process that never imports wush_compile: where it is installed transformers loads, elsewhere it stops."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from helpers import quantize

import wush_compile as wc
from wush_compile.errors import CheckpointError

ROOT = Path(__file__).parents[1]
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(directory of a checkpoint, what its model generates)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=97,
        eos_token_id=None,
    )
    model = quantize(transformers.LlamaForCausalLM(config).eval(), IDS)
    directory = tmp_path_factory.mktemp("autoload") / "model"
    model.save_pretrained(directory)
    return directory, model.generate(IDS, max_new_tokens=8, do_sample=False).tolist()


def process(code, path, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), **environment}
    command = [sys.executable, "-c", code]  # the current directory comes first on its path
    return subprocess.run(command, cwd=path[0], capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the metadata of an installed wush_compile: the entry points of pyproject.toml."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path_factory.mktemp("installed")
    metadata = folder / "wush_compile-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: wush-compile\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in entries.items()) for group, entries in groups.items()
        )
    )
    return folder


# The module that is imported first decides when torch calls the entry point.
@pytest.mark.parametrize("first", ["import torch", "import transformers.quantizers.auto"])
def test_where_it_is_installed(checkpoint, installed, first):
    directory, expected = checkpoint
    code = f"""
{first}
import sys, transformers, torch
transformers.AutoModelForCausalLM
assert "wush_compile" not in sys.modules
model = transformers.AutoModelForCausalLM.from_pretrained({str(directory)!r})
print(model.generate(torch.arange(3, 15)[None], max_new_tokens=8, do_sample=False).tolist())
"""
    done = process(code, [installed])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_where_it_is_not(checkpoint, tmp_path):
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(checkpoint[0])!r})"
    done = process(code, [tmp_path], TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "install-wush-compile-to-load-this-checkpoint" in done.stderr.splitlines()[-1]


def test_a_checkpoint_of_an_older_version_has_no_such_key_and_loads(checkpoint, tmp_path):
    directory, expected = checkpoint
    old = tmp_path / "old"
    old.mkdir()
    for path in directory.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    config = json.loads((old / "config.json").read_text())
    assert config.pop("transformers_weights").endswith(".safetensors")
    (old / "config.json").write_text(json.dumps(config))
    for model in (wc.load(old), transformers.AutoModelForCausalLM.from_pretrained(old)):
        assert model.generate(IDS, max_new_tokens=8, do_sample=False).tolist() == expected


def test_the_layout_of_the_authors_is_named(checkpoint, tmp_path):
    config = json.loads((checkpoint[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "wush"}
    for key in ("wush_sha256", "transformers_weights"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((checkpoint[0] / "model.safetensors").read_bytes())
    for load in (wc.load, transformers.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="WUSH authors' code"):
            load(tmp_path)


def test_a_module_can_be_the_first_import():
    """The ops register when torch is imported, which must not be in the middle of one of the package's modules."""
    code = "from wush_compile import formats; import torch; torch.ops.wush.fp4_linear; formats.get_format('int8')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
