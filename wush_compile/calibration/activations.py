"""Keeps the live values of every batch between two stages, and moves them to the compute device and back.

Values stay on the compute device, or they are offloaded to CPU memory or to files. CPU memory is pinned if a GPU
computes. The files are mapped and already unlinked: the disk space is free again as soon as a value is dropped or the
process dies. While a GPU computes one batch, the values of the next batch are copied.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WushError


class _Stored(NamedTuple):
    """An offloaded tensor. A dimension that only repeats values, as in an expanded mask, is stored with size 1."""

    tensor: Tensor
    shape: torch.Size


def _laid_out_as(value: Tensor, make: Callable[[torch.Size, torch.dtype], Tensor]) -> Tensor:
    """Returns a tensor of the same shape whose dimensions lie in memory in the same order (for `as_strided`)."""
    order = sorted(range(value.dim()), key=lambda d: -value.stride(d))
    made = make(value.permute(order).shape, value.dtype)
    return made.permute([order.index(d) for d in range(value.dim())])


class Activations:
    """The live values of each batch by name: tensors or plain numbers.

    values      one dict for each batch: the model's inputs
    device      where stages compute
    offload     whether values leave the device between stages
    directory   offloads to files there instead of to CPU memory
    """

    def __init__(
        self,
        values: list[dict[str, object]],
        device: torch.device,
        offload: bool = False,
        directory: str | os.PathLike | None = None,
    ):
        self._values, self.device, self.directory = values, device, None if directory is None else Path(directory)
        self.offload = offload or directory is not None
        # One stream for both directions, so that a value is read only after it has been written.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self._values)

    def read(self, names: Iterable[str]) -> Iterator[list[object]]:
        """Yields the values of these names on the compute device, batch after batch."""
        names = list(names)
        if self._stream is None:
            for values in self._values:
                yield [self._to_device(values[name]) for name in names]
            return
        ahead = self._fetch(0, names)
        for index in range(len(self)):
            values, arrived = ahead
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for value in values:
                if isinstance(value, Tensor):
                    value.record_stream(current)
            ahead = self._fetch(index + 1, names) if index + 1 < len(self) else None
            yield values

    def write(self, index: int, values: dict[str, object]) -> None:
        """Keeps new values of a batch."""
        self._values[index].update(
            {
                name: self._store(value) if isinstance(value, Tensor) and self.offload else value
                for name, value in values.items()
            }
        )

    def get(self, index: int, name: str) -> object:
        """Returns one value of a batch on the compute device."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return self._to_device(self._values[index][name])

    def drop(self, index: int, dead: Iterable[str]) -> None:
        """Frees values of a batch."""
        for name in dead:
            self._values[index].pop(name, None)

    def names(self, index: int) -> list[str]:
        """Returns the names of the live values of a batch."""
        return list(self._values[index])

    def _to_device(self, value: object, wait: bool = True) -> object:
        if isinstance(value, _Stored):
            return value.tensor.to(self.device, non_blocking=not wait).expand(value.shape)
        return value.to(self.device, non_blocking=not wait) if isinstance(value, Tensor) else value

    def _fetch(self, index: int, names: list[str]) -> tuple[list[object], torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            values = [self._to_device(self._values[index][name], wait=False) for name in names]
            return values, self._stream.record_event()

    def _store(self, value: Tensor) -> _Stored:
        repeats = [stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)]
        once = value[tuple(slice(0, 1) if r else slice(None) for r in repeats)] if any(repeats) else value
        if self.directory is not None:
            return _Stored(_laid_out_as(once, self._mapped).copy_(once), value.shape)
        if self._stream is None:
            return _Stored(once.to("cpu"), value.shape)
        home = _laid_out_as(once, lambda shape, dtype: torch.empty(shape, dtype=dtype, pin_memory=True))
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            home.copy_(once, non_blocking=True)
        once.record_stream(self._stream)
        return _Stored(home, value.shape)

    def _mapped(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialized tensor that is mapped to an unlinked file."""
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        size = shape.numel() * dtype.itemsize
        try:
            with tempfile.NamedTemporaryFile(prefix="activations-", dir=self.directory) as file:
                # Reserve the space now: on a full disk this raises an OSError; a later write would be a bus error.
                os.posix_fallocate(file.fileno(), 0, size)
                return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
        except OSError as error:
            raise WushError(
                f"{self.directory} cannot take {size} bytes of values between layers ({error.strerror}): "
                "free some space, or give another activations_dir"
            ) from error
