"""`quantize`: the one call from a model to its W4A4 version."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .. import data as calibration_data
from ..capture.export import capture, skeleton
from ..checkpoint import hf
from ..checkpoint.record import Quantization
from ..checkpoint.save_load import saved_names, write_settings
from ..config import WushConfig
from ..data import Batch
from ..errors import CaptureError, ConfigError, DataError, WushError, one_of
from ..modules import install_group, is_quantized
from ..passes.calibration.group import LinearGroup, find_groups
from ..phases import phase, timing
from .fingerprint import fingerprint_of_data, fingerprint_of_model
from .journal import Journal
from .loop import calibrate
from .progress import Progress
from .ranks import Alone, join, local_device
from .solve_group import Solved
from .streaming import open_checkpoint
from .tensors import ModelTensors
from .warm_up import meanwhile, pieces

log = logging.getLogger("wush_compile")
# (windows, tokens in each) that a language model samples for itself where it gets no data.
SELF_WINDOWS = (64, 512)


def _resolve(config: WushConfig | str | None, settings: dict) -> WushConfig:
    if config is not None and not isinstance(config, WushConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass a WushConfig, or settings by name (format='nvfp4')"
        )
    names = [field.name for field in dataclasses.fields(WushConfig)]
    for name in settings:
        one_of("setting", name, names)
    return dataclasses.replace(config or WushConfig(), **settings)


def _numbered(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, so that devices can be compared."""
    return torch.empty(0, device=device).device


def _check_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise WushError(f"{name} has no values (meta device): load the weights before quantizing")


def _without_data(
    model: nn.Module, config: WushConfig, tokenizer, progress: bool, device: torch.device, journal: Journal | None
) -> tuple[list[Batch], bool]:
    """(batches to trace with, whether to calibrate on them) where the user gave no data."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not config.needs_data and isinstance(embeddings, nn.Embedding):
        return [{"input_ids": torch.zeros((2, 8), dtype=torch.int64)}], False
    if not getattr(model, "can_generate", lambda: False)():
        raise DataError(
            f"{type(model).__name__} cannot sample its own calibration text: pass data, an iterable of its inputs"
        )
    if next(model.parameters()).is_meta:
        raise DataError("a streamed model cannot sample its own calibration text: pass data, or do not stream")

    def sample() -> Tensor:
        with _lent(model, device):
            return torch.cat(
                calibration_data.sample_calibration_text(
                    model, tokenizer, *SELF_WINDOWS, seed=config.seed, progress=progress
                )
            ).cpu()

    texts = sample() if journal is None else journal.remember("sampled", sample)  # [windows, tokens]
    return calibration_data.normalize(texts.split(1), model=model), True


@contextlib.contextmanager
def _lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on a device, if it fits there as a whole: generating needs all layers for every token."""
    home = next(model.parameters()).device
    if home == device:
        yield
        return
    try:
        try:
            model.to(device)
        except torch.OutOfMemoryError:
            log.warning("%s does not fit %s as a whole: it samples its text on %s", type(model).__name__, device, home)
            model.to(home)
        yield
    finally:
        model.to(home)


def _prepare(
    model: nn.Module,
    data: Iterable | None,
    config: WushConfig,
    tokenizer,
    progress: bool,
    device: torch.device,
    journal: Journal | None,
) -> tuple[list[Batch], bool]:
    """(batches on the model's device, whether to calibrate on them)."""
    if data is None:
        batches, calibrates = _without_data(model, config, tokenizer, progress, device, journal)
    else:
        batches, calibrates = calibration_data.normalize(data, tokenizer, model), True
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding):
        calibration_data.check_token_ids(batches, embeddings.num_embeddings)
    home = next(model.parameters()).device
    return batches if home.type == "meta" else _moved(batches, home), calibrates


def _moved(batches: list[Batch], device: torch.device) -> list[Batch]:
    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return [{k: move(v) for k, v in b.items()} if isinstance(b, dict) else tuple(map(move, b)) for b in batches]


def _nothing(model: nn.Module, ignored: dict[str, str]) -> CaptureError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(ignored.items())[:3])
    more = f" (and {len(ignored) - 3} more)" if len(ignored) > 3 else ""
    return CaptureError(
        f"nothing to quantize in {type(model).__name__}: "
        f"{reasons + more if reasons else 'its forward applies no linear layer'}"
    )


def _record(groups: list[LinearGroup], solved: list, ignored: dict[str, str], config: WushConfig) -> Quantization:
    described = [
        {"members": [m.name for m in s.group.members], "transform_block_size": s.group.block_size} for s in solved
    ]
    report = {g.name: s.report for g, s in zip(groups, solved, strict=True)}
    return Quantization(config, described, ignored, report)


def _environment(device: torch.device, team: Alone) -> dict[str, object]:
    """What may change the last bit of a result."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "processes": team.size,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": None if cuda else torch.get_num_threads(),
    }


@contextlib.contextmanager
def _run(progress: bool | Progress, team: Alone) -> Iterator[Progress]:
    """The progress of a run, of which the first process alone shows and logs something; tells all if it fails."""
    shown = (
        progress if isinstance(progress, Progress) and team.rank == 0 else Progress(progress is True and team.rank == 0)
    )
    try:
        with timing() as seconds:
            yield shown
        shown.event("finished", seconds={name: round(value, 3) for name, value in seconds.items()})
    except BaseException as error:
        shown.event("failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, Exception):
            team.fail(error)
        raise
    finally:
        if shown is not progress:
            shown.close()


def _solve(
    model: nn.Module,
    tensors: ModelTensors,
    data: Iterable | None,
    config: WushConfig,
    tokenizer,
    progress: Progress,
    device: torch.device,
    team: Alone,
    journal: Journal | None,
    batch_size: int | None,
    activations_dir,
) -> tuple[list[Solved], Quantization]:
    """Every group of a model, which may be on the meta device if `tensors` has its weights; it stays as it is."""
    if data is None:
        tensors.check()  # before the model writes its own text
    batches, calibrates = _prepare(model, data, config, tokenizer, progress.shown, device, journal)
    work = [team.connect, *pieces(model, batches, config, device, team.size, batch_size, pins=activations_dir is None)]
    with meanwhile(tensors.check if data is not None else lambda: None, work if calibrates else [], device):
        if journal is not None:
            names = saved_names(model)
            team.smallest(0)  # the first process has locked the directory and cleared it
            identity = {
                "data": fingerprint_of_data(batches if calibrates else None),
                "model": fingerprint_of_model(model, set(names.values()), tensors),
            }
            journal.begin(model, config, names, identity, _environment(device, team), batch_size)
        with phase("capture"):
            streamed = tensors.device.type == "meta"
            captured = (
                capture(skeleton(model), _moved(batches, tensors.device)) if streamed else capture(model, batches)
            )
            groups, ignored = find_groups(captured.graph_module, model, config)
    if not groups:
        raise _nothing(model, ignored)
    progress.event(
        "run",
        config=config.to_dict(),
        groups=len(groups),
        batches=len(batches),
        device=str(device),
        processes=team.size,
    )
    solved, _ = calibrate(
        model,
        captured,
        groups,
        batches if calibrates else None,
        config,
        progress,
        tensors=tensors,
        device=device,
        team=team,
        journal=journal,
        batch_size=batch_size,
        activations_dir=activations_dir,
    )
    for group, one in zip(groups, solved, strict=True):
        if config.transform_block_size not in (None, one.group.block_size):
            log.warning(
                "%s: width %d is not a multiple of transform_block_size %d; its transform has blocks of %d",
                group.name,
                group.width,
                config.transform_block_size,
                one.group.block_size,
            )
    return solved, _record(groups, solved, ignored, config)


def quantize(
    model: nn.Module,
    data: Iterable | None = None,
    config: WushConfig | None = None,
    *,
    tokenizer=None,
    progress: bool | Progress = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    activations_dir: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    restart: bool = False,
    **settings,
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
    out, restart
        Directory of the checkpoint, written layer by layer (with the tokenizer's files). After a kill or an error the same
        call goes on where it stopped; with other data, settings or weights that is a `ConfigError`, unless `restart`.

    Nothing is changed until every layer has been solved: an error or Ctrl-C leaves the model as it was. Raises a
    `WushError` that names the layer and the remedy. The result is explained by `wush_compile.explain(model)`.
    """
    config = _resolve(config, settings)
    if is_quantized(model):
        raise WushError(f"this {type(model).__name__} is already quantized: start again from the original model")
    if next(model.parameters(), None) is None:
        raise CaptureError(f"nothing to quantize in {type(model).__name__}: it has no parameters")
    _check_values(model)
    where = next(model.parameters()).device if device is None else _numbered(local_device(torch.device(device)))
    team = join(where)
    with _run(progress, team) as shown, _journal(out, restart, team) as journal:
        solved, record = _solve(
            model,
            ModelTensors(model),
            data,
            config,
            tokenizer,
            shown,
            where,
            team,
            journal,
            batch_size,
            activations_dir,
        )
        if journal is not None:
            journal.finish(record, partial(write_settings, model, record, tokenizer=tokenizer))
    for one in solved:
        install_group(model, one.group)
    hf.attach(model, record)
    return model


def quantize_checkpoint(
    source: str | os.PathLike,
    data: Iterable | None = None,
    config: WushConfig | None = None,
    *,
    out: str | os.PathLike,
    tokenizer=None,
    progress: bool | Progress = True,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    activations_dir: str | os.PathLike | None = None,
    restart: bool = False,
    **settings,
) -> nn.Module:
    """Quantizes a causal language model from one directory to another without ever holding it in memory.

    source
        Directory of a Hugging Face model, its weights in safetensors files.
    device
        Where to compute. Default: the CPU.
    the others
        As for `quantize`. A streamed model cannot sample text: all but plain rounding with data-free transforms needs data.

    At most two layers' weights, their moments and the values between layers are in memory. `out` holds the bytes that
    `quantize(model, ..., out=out)` writes for the model in memory. Returns the model's structure (on the meta device) with
    its `wush_quantization` record.
    """
    config = _resolve(config, settings)
    where = _numbered(local_device(torch.device("cpu" if device is None else device)))
    model, tensors = open_checkpoint(source)
    team = join(where)
    with _run(progress, team) as shown, _journal(out, restart, team) as journal:
        solved, record = _solve(
            model, tensors, data, config, tokenizer, shown, where, team, journal, batch_size, activations_dir
        )
        journal.finish(record, partial(write_settings, model, record, tokenizer=tokenizer))
    for one in solved:
        install_group(model, one.group)
    hf.attach(model, record)
    return model


def _journal(out: str | os.PathLike | None, restart: bool, team: Alone):
    return contextlib.nullcontext() if out is None else Journal(out, restart, writes=team.rank == 0)
