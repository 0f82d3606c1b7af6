"""`quantize`: the one call from a model to its W4A4 version."""

import dataclasses
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import data as calibration_data
from . import hf
from .calibrate import calibrate
from .capture import capture
from .config import WushConfig
from .data import Batch
from .distributed import join, local_device
from .errors import CaptureError, ConfigError, DataError, NonFiniteError, WushError, one_of
from .modules import install_group, is_quantized
from .passes.group import LinearGroup, find_groups
from .phases import phase
from .progress import Progress
from .quantization import Quantization

log = logging.getLogger("wush_compile")
# (windows, tokens in each) that a language model samples for itself where it gets no data.
SELF_WINDOWS = (64, 512)


def _resolve(config: WushConfig | str | None, settings: dict) -> WushConfig:
    if config is not None and not isinstance(config, WushConfig):
        raise ConfigError(f"config is a {type(config).__name__}; pass a WushConfig, or settings by name (format='nvfp4')")
    names = [field.name for field in dataclasses.fields(WushConfig)]
    for name in settings:
        one_of("setting", name, names)
    return dataclasses.replace(config or WushConfig(), **settings)


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, so that devices can be compared."""
    return torch.empty(0, device=device).device


def _check_weights(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise WushError(f"{name} has no values (meta device): load the weights before quantizing")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise NonFiniteError(f"the weight {name} has NaN or Inf: the checkpoint is damaged, or was cast to a dtype too small")


def _without_data(model: nn.Module, config: WushConfig, tokenizer, progress: bool) -> tuple[list[Batch], bool]:
    """(batches to trace with, whether to calibrate on them) where the user gave no data."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not config.needs_data and isinstance(embeddings, nn.Embedding):
        return [{"input_ids": torch.zeros((2, 8), dtype=torch.int64)}], False
    if not getattr(model, "can_generate", lambda: False)():
        raise DataError(
            f"{type(model).__name__} cannot sample its own calibration text: pass data, an iterable of its inputs"
        )
    texts = calibration_data.sample_calibration_text(
        model, tokenizer, *SELF_WINDOWS, seed=config.seed, progress=progress)
    return calibration_data.normalize(texts, model=model), True


def _prepare(
    model: nn.Module, data: Iterable | None, config: WushConfig, tokenizer, progress: bool
) -> tuple[list[Batch], bool]:
    """(batches on the model's device, whether to calibrate on them)."""
    if data is None:
        batches, calibrates = _without_data(model, config, tokenizer, progress)
    else:
        batches, calibrates = calibration_data.normalize(data, tokenizer, model), True
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding):
        calibration_data.check_token_ids(batches, embeddings.num_embeddings)
    device = next(model.parameters()).device

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return [
        {k: move(v) for k, v in b.items()} if isinstance(b, dict) else tuple(map(move, b)) for b in batches
    ], calibrates


def _nothing(model: nn.Module, ignored: dict[str, str]) -> CaptureError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(ignored.items())[:3])
    more = f" (and {len(ignored) - 3} more)" if len(ignored) > 3 else ""
    return CaptureError(f"nothing to quantize in {type(model).__name__}: "
                        f"{reasons + more if reasons else 'its forward applies no linear layer'}")


def _record(groups: list[LinearGroup], solved: list, ignored: dict[str, str], config: WushConfig) -> Quantization:
    described = [
        {"members": [m.name for m in s.group.members], "transform_block_size": s.group.block_size} for s in solved
    ]
    report = {g.name: s.report for g, s in zip(groups, solved, strict=True)}
    return Quantization(config, described, ignored, report)


def quantize(
    model: nn.Module, data: Iterable | None = None, config: WushConfig | None = None, *,
    tokenizer=None, progress: bool | Progress = True, device: torch.device | str | None = None,
    batch_size: int | None = None, activations_dir: str | os.PathLike | None = None, **settings,
) -> nn.Module:
    """Quantizes the linears of a model to 4 bits on both sides, in place, and returns the same object.

    model
        Any traceable `nn.Module`; Hugging Face models keep `generate`, `save_pretrained` and the rest.
    data
        Calibration inputs: an iterable of `input_ids` tensors, of dicts of model inputs, or of strings (with
        `tokenizer`); for other modules, of input tensors or tuples of them. 128 windows of 512 tokens are plenty for a
        language model. Without data a causal language model samples its own text; plain rounding with data-free
        transforms reads none.
    config, settings
        A `WushConfig`, its fields by name, or both (a field by name wins).
    progress
        Whether to show a bar; a `Progress` also writes a log.
    device
        Where to compute. Default: where the model is. With a GPU here and the model in CPU memory, the GPU holds one layer's
        weights at a time, and the result is in CPU memory again.
    batch_size
        Sequences in one forward. Default: batches as they are; on a GPU that the model is not on, as many as fit well.
    activations_dir
        Directory for the values between layers, which otherwise wait in memory: 2 bytes × tokens × width of a layer.

    Nothing is changed until every layer has been solved: an error or Ctrl-C leaves the model as it was. Raises a
    `WushError` that names the layer and the remedy. The result is explained by `wush_compile.explain(model)`.
    """
    config = _resolve(config, settings)
    if is_quantized(model):
        raise WushError(f"this {type(model).__name__} is already quantized: start again from the original model")
    if next(model.parameters(), None) is None:
        raise CaptureError(f"nothing to quantize in {type(model).__name__}: it has no parameters")
    _check_weights(model)
    batches, calibrates = _prepare(model, data, config, tokenizer, bool(progress))
    with phase("capture"):
        captured = capture(model, batches)
        groups, ignored = find_groups(captured.graph_module, model, config)
    if not groups:
        raise _nothing(model, ignored)
    where = next(model.parameters()).device if device is None else _numbered(local_device(torch.device(device)))
    team = join(where)
    solved, _ = calibrate(
        model, captured, groups, batches if calibrates else None, config, progress if team.rank == 0 else False, team=team,
        batch_size=batch_size, device=where, activations_dir=activations_dir,
    )
    record = _record(groups, solved, ignored, config)
    for group, one in zip(groups, solved, strict=True):
        if config.transform_block_size not in (None, one.group.block_size):
            log.warning("%s: width %d is not a multiple of transform_block_size %d; its transform has blocks of %d",
                        group.name, group.width, config.transform_block_size, one.group.block_size)
    del captured
    for one in solved:
        install_group(model, one.group)
    hf.attach(model, record)
    return model
