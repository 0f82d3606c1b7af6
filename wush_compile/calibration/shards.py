"""The tensors of a checkpoint on disk, one at a time: no file stays open, so that nothing it maps stays in memory."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..checkpoint.layout import Spec
from ..errors import CheckpointError


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
