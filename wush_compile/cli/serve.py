"""`wush-compile serve`: an OpenAI-compatible server, by vLLM where it is installed, else by transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CheckpointError, ConfigError, WushError
from .app import Checkpoint, app, one_line_errors, say

VLLM, PLUGIN = "vllm", "wush"
# transformers' own command, in a process that certainly knows our checkpoints.
TRANSFORMERS = "import wush_compile.checkpoint.hf; from transformers.cli.transformers import app; app()"


def _vllm(directory: Path, host: str, port: int, more: list[str]) -> list[str]:
    """The command of vLLM's server. Raises `CheckpointError` where vLLM would not find the plug-in, or it not vLLM."""
    from ..vllm import refused_release

    if reason := refused_release():
        raise CheckpointError(reason)
    found = any(point.name == PLUGIN for point in importlib.metadata.entry_points(group="vllm.general_plugins"))
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found or (allowed is not None and PLUGIN not in allowed.split(",")):
        why = f"VLLM_PLUGINS={allowed} leaves it out" if found else "wush-compile is not installed in this environment"
        raise CheckpointError(f"vLLM would not find the plug-in {PLUGIN!r}: {why}")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(directory)]
    return [*command, "--host", host, "--port", str(port), *more]


def _transformers(directory: Path, host: str, port: int, more: list[str]) -> list[str]:
    """The command of transformers' server, with continuous batching. Raises `ConfigError` if it is not installed."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError(
            "neither vLLM nor transformers' server is installed: pip install vllm, or 'transformers[serving]'"
        )
    command = [sys.executable, "-c", TRANSFORMERS, "serve", str(directory), "--continuous-batching"]
    return [*command, "--host", host, "--port", str(port), *more]


def curl(directory: Path, host: str, port: int, key: str | None) -> str:
    """A line of shell that asks the server for some text."""
    body = {"model": str(directory), "prompt": "Once upon a time", "max_tokens": 16}
    headers = ["Content-Type: application/json", *([f"Authorization: Bearer {key}"] if key else [])]
    options = [part for header in headers for part in ("-H", header)]
    return shlex.join(["curl", f"http://{host}:{port}/v1/completions", *options, "-d", json.dumps(body)])


def _run(command: list[str], env: dict[str, str]) -> None:
    """Runs a server until it is told to stop, by Ctrl-C or SIGTERM. Raises `WushError` if it ends by itself."""
    process, told = subprocess.Popen(command, env=env), []

    def stop(*_) -> None:
        told.append(True)
        process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the server too
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if not told:
        print(file=sys.stderr)  # the last message of a process may lack the end of its line
        raise WushError(f"the server ended by itself, with status {status}; its messages are above")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    directory: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Others reach the server only with another.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key that requests must bring (vLLM only).")] = None,
) -> None:
    """Serve a checkpoint through an OpenAI-compatible API: by vLLM if it is installed, else by transformers.

    Further options go to that server: `wush-compile serve DIR --tensor-parallel-size 2`.
    """
    from ..checkpoint.files import read_config
    from ..checkpoint.layout import read_record

    with one_line_errors("interrupted: the server stopped"):
        read_record(read_config(directory)["quantization_config"])
        by_vllm = importlib.util.find_spec(VLLM) is not None
        if api_key and not by_vllm:
            raise ConfigError("transformers' server takes no key: install vLLM, or leave --api-key out")
        command = (_vllm if by_vllm else _transformers)(directory, host, port, context.args)
        # In the environment, because arguments are seen by every user of the machine.
        env = os.environ | ({"VLLM_API_KEY": api_key} if api_key else {})
        say(f"{'vLLM' if by_vllm else 'transformers'} serves {directory} at http://{host}:{port}/v1, once it is ready:")
        say(curl(directory, host, port, api_key))
        _run(command, env)
