"""The files of a checkpoint: names, headers, digests. Nothing is unpickled.

`Weights` keeps its files mapped: it serves a model that is loaded as a whole. `Shards` opens a file for each read and
copies: nothing it has mapped stays in memory while a model is streamed.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import Tensor

from ..errors import CheckpointError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


JOURNAL = ".wush"  # of the run that made a checkpoint, in its directory


WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


DIGEST = "wush_sha256"


class Spec(NamedTuple):
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def digest(settings: Mapping, names: Iterable[str], tensor) -> str:
    """sha256 over a `quantization_config` and over name, dtype, shape and bytes of each tensor, sorted by name."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(names):
        value = tensor(name).detach().cpu().contiguous()
        sha.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read_config(directory: Path) -> dict:
    """The `config.json` of a checkpoint, as far as it tells that it is one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory: give the one that wush_compile.save wrote")
    try:
        config = json.loads((directory / CONFIG).read_text())
        method = config["quantization_config"]["quant_method"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is no checkpoint: it has no {CONFIG}") from None
    except (KeyError, TypeError):
        method = None
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG} is not JSON ({error}): save the model again") from None
    if method != "wush":
        raise CheckpointError(
            f"{directory} is no wush checkpoint: its {CONFIG} has no quantization_config of "
            "quant_method 'wush'; quantize the model first"
        )
    return config


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in one piece or in shards."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        others = [p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f", only {', '.join(sorted(others))}, which is never unpickled" if others else ""
        raise CheckpointError(f"{directory} has no {WEIGHTS}{found}: save the model again")
    try:
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{directory / INDEX} cannot be read: save the model again") from None
    return [directory / os.path.basename(name) for name in names]


class Weights:
    """The tensors of safetensors files, with their `specs`; opening reads the headers and checks the lengths."""

    def __init__(self, files: Iterable[str | os.PathLike]):
        self._files, self.specs = {}, {}
        for path in map(Path, files):
            if path.suffix != ".safetensors":
                raise CheckpointError(f"{path} is not safetensors, and nothing else is read: save the model again")
            try:
                file = safetensors.safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    self._files[name] = file
                    tensor = file.get_tensor(name)  # mapped, not read
                    self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing: copy or save the checkpoint again") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise CheckpointError(f"{path} is truncated or damaged ({error}): copy or save it again") from error

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is on disk; its memory may be the file's."""
        return self._files[name].get_tensor(name)

    def verify(self, settings: Mapping, expected: str | None) -> None:
        """Compares the digest."""
        if expected is None:
            raise CheckpointError(f"{CONFIG} has no {DIGEST}, so the tensors cannot be checked: save the model again")
        if digest(settings, self.specs, self.tensor) != expected:
            raise CheckpointError(
                "the tensors or the quantization_config are not those that were saved "
                f"({DIGEST} differs): copy or save the checkpoint again"
            )


def sha256_of(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shards:
    """safetensors files, by the names of their tensors; `specs` are read when a file is added."""

    def __init__(self, files: Iterable[Path] = ()):
        self._files: dict[str, Path] = {}
        self.specs: dict[str, Spec] = {}
        for path in files:
            self.add(path)

    def add(self, path: Path) -> None:
        """Reads the header of a file."""
        for name, tensor in self._open(path, None).items():
            self._files[name] = path
            self.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)

    def index(self) -> dict:
        """What `model.safetensors.index.json` says of all files."""
        size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in self.specs.values())
        return {"metadata": {"total_size": size}, "weight_map": {name: path.name for name, path in self._files.items()}}

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copies of the tensors of these names, on the CPU; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        return {name: tensor for path, own in by_file.items() for name, tensor in self._open(path, own).items()}

    def tensor(self, name: str) -> Tensor:
        """A copy of one tensor, on the CPU."""
        return self.tensors([name])[name]

    @staticmethod
    def _open(path: Path, names: list[str] | None) -> Mapping[str, Tensor]:
        """Copies of tensors of a file; with None all of it, on the meta device."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if names is None:
                    return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (no mapping)
                return {name: file.get_tensor(name).clone(memory_format=torch.contiguous_format) for name in names}
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: copy or save the checkpoint again") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): copy or save it again") from error
