"""Reads the files of a checkpoint: names, headers, tensors, digests. Nothing is unpickled.

`Weights` keeps its files mapped, for a model that is loaded as a whole. `Shards` opens a file for each read and copies,
so that no mapped page stays in memory while a model is streamed.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
JOURNAL = ".wush"  # folder in a checkpoint's directory: the journal of the run that made it
DIGEST = "wush_sha256"  # key of the digest in config.json


class Spec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def digest(settings: Mapping, names: Iterable[str], tensor) -> str:
    """SHA-256 of a `quantization_config` and of the name, dtype, shape and bytes of each tensor, sorted by name.

    `tensor(name)` gives a tensor.
    """
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(names):
        value = tensor(name).detach().cpu().contiguous()
        sha.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read_config(directory: Path) -> dict:
    """Reads `config.json` and checks that it belongs to a wush checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory: give the one that wush_compile.save wrote")
    try:
        config = json.loads((directory / CONFIG).read_text())
        method = config["quantization_config"]["quant_method"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a checkpoint: it has no {CONFIG}") from None
    except (KeyError, TypeError):
        method = None
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG} is not JSON ({error}): save the model again") from None
    if method != "wush":
        raise CheckpointError(
            f"{directory} is not a wush checkpoint: its {CONFIG} has no quantization_config of "
            "quant_method 'wush'; quantize the model first"
        )
    return config


def weight_files(directory: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names.

    With a variant, `model.VARIANT.safetensors` and `model.safetensors.index.VARIANT.json`, as transformers names them.
    """
    weights = WEIGHTS if variant is None else f"model.{variant}.safetensors"
    index = directory / (INDEX if variant is None else f"model.safetensors.index.{variant}.json")
    if (directory / weights).is_file():
        return [directory / weights]
    if not index.is_file():
        others = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f", only {', '.join(sorted(others))}, which is never unpickled" if others else ""
        raise CheckpointError(f"{directory} has no {weights}{found}: save the model again")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index} cannot be read: save the model again") from None
    return [directory / os.path.basename(name) for name in names]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns the errors of reading a safetensors file into `CheckpointError`."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: copy or save the checkpoint again") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): copy or save it again") from error


def _open(path: Path) -> tuple[safetensors.safe_open, dict[str, Spec]]:
    """A safetensors file, and the specs in its header. Opening it checks its length."""
    with _reading(path):
        file, specs = safetensors.safe_open(path, framework="pt"), {}
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_tensor(name)  # mapped, not read
            specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        return file, specs


class Weights:
    """The tensors of safetensors files that stay mapped, by name; `specs` has all of them."""

    def __init__(self, files: Iterable[str | os.PathLike]):
        self._files, self.specs = {}, {}
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path} is not safetensors, and nothing else is read: save the model again")
            file, specs = _open(path)
            self._files |= dict.fromkeys(specs, file)
            self.specs |= specs

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is on disk. Its memory may be the file's."""
        return self._files[name].get_tensor(name)

    def verify(self, settings: Mapping, expected: str | None) -> None:
        """Raises `CheckpointError` unless `expected` is the digest of `settings` and of all tensors."""
        if expected is None:
            raise CheckpointError(f"{CONFIG} has no {DIGEST}, so the tensors cannot be checked: save the model again")
        if digest(settings, self.specs, self.tensor) != expected:
            raise CheckpointError(
                "the tensors or the quantization_config are not those that were saved "
                f"({DIGEST} differs): copy or save the checkpoint again"
            )


class Shards:
    """The tensors of safetensors files that are opened for each read, by name; `specs` has all of them."""

    def __init__(self, files: Iterable[Path] = ()):
        self._paths: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for path in files:
            self.add(path)

    def add(self, path: Path) -> None:
        """Reads the header of a file."""
        _, specs = _open(path)
        self._paths |= dict.fromkeys(specs, path)
        self.specs |= specs

    def index(self) -> dict:
        """The content of `model.safetensors.index.json` for all files."""
        size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.specs.values())
        return {"metadata": {"total_size": size}, "weight_map": {name: path.name for name, path in self._paths.items()}}

    def each(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of these names, file by file, mapped: one is to be copied before the next is asked for."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._paths[name], []).append(name)
        for path, own in by_file.items():
            with _reading(path), safetensors.safe_open(path, framework="pt") as file:
                for name in own:
                    yield name, file.get_tensor(name)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the tensors of these names, on the CPU. Each file is opened once."""
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.each(names)}

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU."""
        return self.tensors([name])[name]
