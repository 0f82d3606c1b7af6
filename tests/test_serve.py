"""`wush-compile serve`: the command of the server, and what is refused before one starts."""

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import branches, quantize
from models import plain, tokens
from typer.testing import CliRunner

import wush_compile as wc
from wush_compile import vllm
from wush_compile.cli import app


@pytest.fixture
def started(monkeypatch):
    """The servers that were started, as (command, environment). None runs: each is told to stop at once."""
    calls = []

    class Told:
        def __init__(self, command, env):
            calls.append((command, env))

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return 0

        def terminate(self):
            pass

    monkeypatch.setattr(subprocess, "Popen", Told)
    return calls


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "checkpoint"
    wc.save(branches(transform="hadamard")[0], path)
    return str(path)


def with_vllm(monkeypatch, release="0.32.1", plugins=("wush",)) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True if name == "vllm" else find(name, *a))
    monkeypatch.setattr(vllm, "_release", lambda: release)
    points = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)


def serve(*arguments: str):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_by_vllm(monkeypatch, started, directory):
    with_vllm(monkeypatch)
    result = serve(directory, "--port", "8123", "--api-key", "secret", "--tensor-parallel-size", "2")
    [(command, env)] = started
    options = ["serve", directory, "--host", "127.0.0.1", "--port", "8123", "--tensor-parallel-size", "2"]
    assert result.exit_code == 0 and command == [sys.executable, "-m", "vllm.entrypoints.cli.main", *options]
    assert env["VLLM_API_KEY"] == "secret"
    first, second = result.output.strip().splitlines()
    assert first == f"vLLM serves {directory} at http://127.0.0.1:8123/v1, once it is ready:"
    assert second.startswith("curl http://127.0.0.1:8123/v1/completions -H") and "Bearer secret" in second


@pytest.mark.parametrize(
    "release, plugins, allowed, says",
    [
        ("0.31.0", ("wush",), None, "works with vLLM 0.32.x, and vLLM 0.31.0 is installed"),
        ("0.32.0", ("other",), None, "wush-compile is not installed in this environment"),
        ("0.32.0", ("wush",), "other", "VLLM_PLUGINS=other leaves it out"),
    ],
)
def test_never_without_its_plugin(monkeypatch, started, directory, release, plugins, allowed, says):
    with_vllm(monkeypatch, release, plugins)
    if allowed:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    result = serve(directory)
    assert result.exit_code == 1 and says in result.output and not started


def test_by_transformers(monkeypatch, started, directory):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    result = serve(directory, "--device", "cpu")
    [(command, _)] = started
    assert result.exit_code == 0 and command[:2] == [sys.executable, "-c"] and "wush_compile" in command[2]
    assert command[3:6] == ["serve", directory, "--continuous-batching"] and command[-2:] == ["--device", "cpu"]
    assert "takes no key" in serve(directory, "--api-key", "secret").output
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    assert "pip install vllm" in serve(directory).output


def test_what_is_no_checkpoint(started, tmp_path):
    result = serve(str(tmp_path))
    assert result.exit_code == 1 and "is not a checkpoint" in result.output and not started


def test_a_server_that_fails(monkeypatch, directory):
    with_vllm(monkeypatch)
    popen = subprocess.Popen
    code = "import sys; sys.exit(3)"
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: popen([sys.executable, "-c", code]))
    result = serve(directory)
    assert result.exit_code == 1 and "the server ended by itself, with status 3" in result.output


def test_save_warns_of_what_vllm_cannot_serve(tmp_path, caplog):
    model = plain("llama", layers=1)
    wc.save(quantize(model, tokens(2, 16), ignore=("*.k_proj",), transform="hadamard"), tmp_path / "half")
    [record] = [r for r in caplog.records if "vLLM cannot serve" in r.message]
    assert "model.layers.0.self_attn.k_proj as one linear" in record.message
    caplog.clear()
    model = plain("llama", layers=1)
    wc.save(quantize(model, tokens(2, 16), ignore=("*.[qkv]_proj",), transform="hadamard"), tmp_path / "whole")
    assert not [r for r in caplog.records if "vLLM cannot serve" in r.message]
