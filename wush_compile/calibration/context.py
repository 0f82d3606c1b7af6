"""`Run`: the devices, processes and directories of one quantization run; and what surrounds it."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from .journal import Journal
from .progress import Progress
from .ranks import SINGLE_PROCESS, SingleProcess
from .tensors import ModelTensors


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Turns `torch.autocast` off in the block: a model is traced and calibrated in its own dtype, which it keeps.

    A graph traced under autocast has casts of its own, which the model with quantized linears lacks.
    """
    with contextlib.ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass
class Run:
    """What a run uses besides the model, the data and the configuration.

    tensors         where the weights of a stage come from
    device          where stages compute
    progress        the bar and the log
    ranks           the other processes of the run; by default there are none
    journal         the output directory; None writes nothing
    batch_size      sequences in one forward; None lets the run choose
    activations_dir the directory for values between layers; None keeps them in memory
    """

    tensors: ModelTensors
    device: torch.device
    progress: Progress = field(default_factory=lambda: Progress(bar=False))
    ranks: SingleProcess = SINGLE_PROCESS
    journal: Journal | None = None
    batch_size: int | None = None
    activations_dir: str | os.PathLike | None = None

    def __post_init__(self) -> None:
        if self.activations_dir is not None and not os.path.isdir(self.activations_dir):
            raise ConfigError(f"there is no directory {self.activations_dir} for values between layers: make it first")

    @property
    def offloads(self) -> bool:
        """Whether the model stays on another device than the compute device."""
        return self.device != self.tensors.device
