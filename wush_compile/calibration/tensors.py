"""Loads the weights of a stage from a model in memory, and moves tensors to the compute device and back.

`streaming.py` loads the weights from a checkpoint instead.
"""

from collections.abc import Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..capture.wrappers import execution_device, offloaded_tensors
from ..errors import NonFiniteError, WushError
from ..passes.calibration.linears import parametrized_weights


def finite(tensor: Tensor) -> bool:
    """Tells whether a tensor has no NaN and no Inf.

    Its minimum or its maximum carries any of them. A CPU finds these two fifty times faster than it tests every value.
    """
    return not tensor.is_floating_point() or tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def check_finite(name: str, weight: Tensor) -> None:
    """Raises a `NonFiniteError` if a weight has NaN or Inf."""
    if not finite(weight):
        if weight.dim() == 3:  # of experts: the first one at fault
            name = f"{name}[{next(e for e, own in enumerate(weight) if not finite(own))}]"
        raise NonFiniteError(
            f"the weight {name} has NaN or Inf: the checkpoint is damaged, or was cast to a dtype too small"
        )


class ModelTensors:
    """The parameters and buffers of a model in memory, by name.

    device   where the model is
    home     where solved groups wait until they are installed; the meta device leaves their values in the journal
    """

    def __init__(self, model: nn.Module):
        self.device = self.home = next(model.parameters()).device
        self._weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._tensors = {
            name: tensor.detach()
            for named in (model.named_parameters, model.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        } | parametrized_weights(model)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self) -> None:
        """Raises a `NonFiniteError` that names the first parameter with NaN or Inf."""
        for name, tensor in self._weights.items():
            check_finite(name, tensor)

    def load(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Returns the named tensors on a device. A tensor that is already there is not copied."""
        return {name: self._tensors[name].to(device) for name in names}


class OffloadedTensors(ModelTensors):
    """The tensors of a model that accelerate has offloaded. Its hooks hold the values of those on the meta device.

    Solved groups live where the hooks bring weights to: they are small enough to stay there.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.device, self.home = torch.device("meta"), execution_device(model)
        self._held = offloaded_tensors(model)

    def check(self) -> None:
        """Raises a `NonFiniteError` that names the first parameter with NaN or Inf."""
        for name in self._weights:
            check_finite(name, self.load([name], torch.device("cpu"))[name])

    def load(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Returns the named tensors on a device, those on the meta device with the values that the hooks hold."""
        loaded = {}
        for name in names:
            values, key = self._held.get(name, (self._tensors, name))
            loaded[name] = values[key].detach().to(device)
        return loaded


def tensors_of(model: nn.Module) -> ModelTensors:
    """Returns the tensors of a model in memory, which accelerate may have offloaded. A tensor without values raises."""
    held = offloaded_tensors(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta and name not in held:
            raise WushError(f"{name} has no values (meta device): load the weights before quantizing")
    return OffloadedTensors(model) if held else ModelTensors(model)


class Loader:
    """Loads tensors to the compute device; to a GPU also ahead of time, while it computes.

    Loading ahead runs in a thread, because a copy from pageable memory or from files blocks its thread.
    """

    def __init__(self, tensors: ModelTensors, device: torch.device):
        self._tensors, self._device = tensors, device
        self._ahead: tuple[Hashable, Future] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and device != tensors.device else None
        self._thread = ThreadPoolExecutor(1, "loader") if self._stream is not None else None

    def start(self, key: Hashable, names: list[str]) -> None:
        """Starts to load what `take` will ask for by this key. Only one key is loaded ahead at a time."""
        if self._thread is not None:
            self._drop()
            self._ahead = key, self._thread.submit(self._load, names)

    def take(self, key: Hashable, names: list[str]) -> dict[str, Tensor]:
        """Returns the named tensors on the device. Raises the errors of loading."""
        if self._ahead is None or self._ahead[0] != key:
            self._drop()
            return self._tensors.load(names, self._device)
        future, self._ahead = self._ahead[1], None
        loaded, arrived = future.result()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(arrived)
        for tensor in loaded.values():
            tensor.record_stream(current)
        return loaded

    def close(self) -> None:
        """Ends the thread."""
        self._drop()
        if self._thread is not None:
            self._thread.shutdown()

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].exception()  # waits, so that its tensors are freed before others are loaded
            self._ahead = None

    def _load(self, names: list[str]) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            return self._tensors.load(names, self._device), self._stream.record_event()


class ResultMover:
    """Moves solved groups to their home device; from a GPU in a thread, while it computes the next stage."""

    def __init__(self, home: torch.device, device: torch.device):
        self._home, self._device = home, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and device != home else None
        self._thread = ThreadPoolExecutor(1, "mover") if self._stream is not None else None
        self._moving: Future | None = None

    def start(self, groups: list[nn.Module]) -> None:
        """Starts to move the groups of a stage. Nobody else may read them before `wait` returns."""
        if self._thread is None:
            for group in groups:
                group.to(self._home)
            return
        self.wait()
        computed = torch.cuda.current_stream(self._device).record_event()
        self._moving = self._thread.submit(self._move, groups, computed)

    def wait(self) -> None:
        """Waits until all groups have arrived."""
        if self._moving is not None:
            moving, self._moving = self._moving, None
            moving.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        self.wait()
        if self._thread is not None:
            self._thread.shutdown()

    def _move(self, groups: list[nn.Module], computed: torch.cuda.Event) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            for group in groups:
                group.to(self._home)  # blocks until the copy is done, so the freed memory can be reused at once
