"""`quantize` and `quantize_checkpoint`: from a model and data to a quantized model."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn

from ..capture.example import describe_batch
from ..capture.export import capture, largest_batch
from ..capture.meta import meta_copy
from ..capture.wrappers import unwrapped
from ..checkpoint import hf
from ..checkpoint.record import Quantization
from ..checkpoint.save_load import saved_names, write_settings
from ..checkpoint.source import load_model
from ..config import CONFIG_FIELDS, WushConfig
from ..data import described
from ..errors import CaptureError, ConfigError, WushError, one_of
from ..modules import install_group, is_quantized
from ..passes.calibration.group import LinearGroup, find_groups
from ..phases import phase, timing
from .context import Run, without_autocast
from .fingerprint import fingerprint_of_data, fingerprint_of_model
from .inputs import moved, prepare_batches
from .journal import Journal
from .loop import calibrate
from .progress import Progress, memory
from .ranks import SingleProcess, join, local_device
from .solve_group import Solved
from .streaming import open_checkpoint
from .tensors import tensors_of
from .verify import verify
from .warm_up import run_during, warm_up_tasks

log = logging.getLogger("wush_compile")


@without_autocast()
def quantize(
    model: nn.Module | str | os.PathLike,
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
        Any `nn.Module` that `torch.export` can trace. What `torch.compile`, `DataParallel` or accelerate's offloading
        has wrapped is quantized inside its wrapper. Hugging Face models keep `generate`, `save_pretrained` and the
        rest. A directory, a GGUF file or a name on the hub is loaded with `load_model`, with its tokenizer.
    data
        Calibration inputs: an iterable of `input_ids` tensors, of dicts of model inputs, or of strings (with
        `tokenizer`); for other modules, of input tensors or tuples of them. 128 windows of 512 tokens are plenty for a
        language model. Without data, a causal language model samples its own text. Plain rounding with data-free
        transforms needs no data.
    config, settings
        A `WushConfig`, its fields by name, or both. A field by name wins.
    progress
        Whether to show a bar. A `Progress` also writes a log.
    device
        Where to compute. Default: where the model is. If the model is in CPU memory and `device` is a GPU, the GPU
        holds one layer's weights at a time, and the result is in CPU memory.
    batch_size
        Sequences in one forward. Default: the batches as they are; on a GPU that does not hold the model, as many as
        fit.
    activations_dir
        Directory for the values between layers (2 bytes × tokens × width of a layer, up to five times that with a
        `correction`). Default: in memory.
    out, restart
        Directory of the checkpoint, written layer by layer, with the tokenizer's files. After a kill or an error, the
        same call continues where it stopped. A call with other data, settings or weights raises `ConfigError`;
        `restart=True` starts over instead.

    The model does not change until every layer has been solved, and until one batch has shown that it computes with
    quantized linears what its graph computes: an error or Ctrl-C leaves it as it was. Raises a `WushError` that names
    the layer and the remedy. `wush_compile.explain(model)` shows the result. Everything is computed in the model's own
    dtype, float32, bfloat16 or float16: `torch.autocast` around the call has no effect.
    """
    config = _resolve(config, settings)
    if isinstance(model, str | os.PathLike):
        model, own = load_model(model)
        tokenizer = own if tokenizer is None else tokenizer
    given, model = model, unwrapped(model)
    if is_quantized(model):
        raise WushError(f"this {type(model).__name__} is already quantized: start again from the original model")
    if isinstance(model, nn.Linear):
        raise CaptureError("a linear is replaced in the module that holds it: quantize nn.Sequential(linear)")
    if next(model.parameters(), None) is None:
        raise CaptureError(f"nothing to quantize in {type(model).__name__}: it has no parameters")
    tensors = tensors_of(model)
    where = tensors.home if device is None else _numbered(local_device(torch.device(device)))
    ranks = join(where)
    with _shown(progress, ranks) as shown, _journal(out, restart, ranks) as journal:
        run = Run(tensors, where, shown, ranks, journal, batch_size, activations_dir)
        _quantize(model, data, config, tokenizer, run)
    return given


@without_autocast()
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
    """Quantizes a causal language model from one directory to another and never holds the whole model in memory.

    source
        Directory of a Hugging Face model with weights in safetensors files.
    device
        Where to compute. Default: the CPU.
    the others
        As for `quantize`. A streamed model cannot sample text, so it needs data, except for plain rounding with
        data-free transforms.

    At most two layers' weights, their moments and the values between layers are in memory. `out` gets the same bytes as
    from `quantize(model, ..., out=out)` with the model in memory. Returns the model's structure on the meta device,
    with its `wush_quantization` record.
    """
    config = _resolve(config, settings)
    where = _numbered(local_device(torch.device("cpu" if device is None else device)))
    model, tensors = open_checkpoint(source)
    ranks = join(where)
    with _shown(progress, ranks) as shown, _journal(out, restart, ranks) as journal:
        run = Run(tensors, where, shown, ranks, journal, batch_size, activations_dir)
        return _quantize(model, data, config, tokenizer, run)


def _quantize(model: nn.Module, data: Iterable | None, config: WushConfig, tokenizer, run: Run) -> nn.Module:
    """Solves every group, finishes the journal, and installs the groups in the model."""
    with timing() as seconds:
        solved, record = _solve(model, data, config, tokenizer, run)
    record.run |= {
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "device": _environment(run)["device"],
        "peak_memory": memory(run.device),
    }
    if run.journal is not None:
        run.journal.finish(record, partial(write_settings, model, record, tokenizer=tokenizer))
    for one in solved:
        install_group(model, one.group)
    hf.attach(model, record)
    return model


def _solve(
    model: nn.Module, data: Iterable | None, config: WushConfig, tokenizer, run: Run
) -> tuple[list[Solved], Quantization]:
    """Solves every group of a model, and verifies that the model runs with them.

    Leaves the model as it was. It may be on the meta device: `run.tensors` has the weights.
    """
    tensors, journal, ranks = run.tensors, run.journal, run.ranks
    if data is None:
        tensors.check()  # before the model samples its own text
    batches, calibrates = prepare_batches(model, data, config, tokenizer, run.progress.shown, run.device, journal)
    tasks = [ranks.connect, *warm_up_tasks(model, batches, config, run)] if calibrates else []
    with run_during(tensors.check if data is not None else lambda: None, tasks, run.device):
        if journal is not None:
            names = saved_names(model)
            ranks.smallest(0)  # waits until the first process has locked and cleared the directory
            identity = {
                "data": fingerprint_of_data(batches if calibrates else None),
                "model": fingerprint_of_model(model, set(names.values()), tensors),
            }
            journal.begin(model, config, names, identity, _environment(run), run.batch_size)
        with phase("capture"):
            streamed = tensors.device.type == "meta"
            captured = (
                capture(meta_copy(model), moved(batches, tensors.device)) if streamed else capture(model, batches)
            )
            groups, ignored = find_groups(captured.graph_module, model, config)
    if not groups:
        raise _nothing(model, ignored)
    run.progress.event(
        "run",
        config=config.to_dict(),
        groups=len(groups),
        batches=len(batches),
        device=str(run.device),
        processes=ranks.size,
    )
    solved, stages = calibrate(captured, groups, batches if calibrates else None, run)
    with phase("verify"):
        verified = verify(model, captured, stages, groups, solved, batches, run)
    for group, one in zip(groups, solved, strict=True):
        if group.recipe.transform_block_size not in (None, one.group.block_size):
            log.warning(
                "%s: width %d is not a multiple of transform_block_size %d; its transform has blocks of %d",
                group.name,
                group.width,
                group.recipe.transform_block_size,
                one.group.block_size,
            )
    record = _record(groups, solved, ignored, config, describe_batch(largest_batch(batches)))
    record.run = {"verified": verified} | ({"calibration": described(batches)} if calibrates else {})
    return solved, record


def _record(
    groups: list[LinearGroup],
    solved: list[Solved],
    ignored: dict[str, str],
    config: WushConfig,
    example: dict | None,
) -> Quantization:
    record = Quantization(config, [], ignored, example=example)
    for group, one in zip(groups, solved, strict=True):
        members = [m.name for m in one.group.members]
        record.groups.append(
            record.describe(members, one.group.block_size, group.recipe, group.experts, group.embeddings)
        )
        record.report[group.name] = one.report
    return record


# -- arguments -------------------------------------------------------------------------------------------------------


def _resolve(config: WushConfig | None, settings: dict) -> WushConfig:
    if config is not None and not isinstance(config, WushConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass a WushConfig, or settings by name (format='nvfp4')"
        )
    for name in settings:
        one_of("setting", name, CONFIG_FIELDS)
    return dataclasses.replace(config or WushConfig(), **settings)


def _numbered(device: torch.device) -> torch.device:
    """Resolves `cuda` to `cuda:0`, so that devices can be compared."""
    return torch.empty(0, device=device).device


def _nothing(model: nn.Module, ignored: dict[str, str]) -> CaptureError:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(ignored.items())[:3])
    more = f" (and {len(ignored) - 3} more)" if len(ignored) > 3 else ""
    return CaptureError(
        f"nothing to quantize in {type(model).__name__}: "
        f"{reasons + more if reasons else 'its forward applies no linear layer'}"
    )


# -- the surroundings of a run ---------------------------------------------------------------------------------------


def _environment(run: Run) -> dict[str, object]:
    """Returns what may change the last bit of a result."""
    cuda = run.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "processes": run.ranks.size,
        "device": torch.cuda.get_device_name(run.device) if cuda else run.device.type,
        "threads": None if cuda else torch.get_num_threads(),
    }


def _journal(out: str | os.PathLike | None, restart: bool, ranks: SingleProcess):
    return contextlib.nullcontext() if out is None else Journal(out, restart, writes=ranks.rank == 0)


@contextlib.contextmanager
def _shown(progress: bool | Progress, ranks: SingleProcess) -> Iterator[Progress]:
    """Yields the progress of a run, which only rank 0 shows. A failure is logged and told to the other ranks."""
    first = ranks.rank == 0
    shown = progress if isinstance(progress, Progress) and first else Progress(progress is True and first)
    try:
        with timing() as seconds:
            yield shown
        shown.event("finished", seconds={name: round(value, 3) for name, value in seconds.items()})
    except BaseException as error:
        shown.event("failed", error=f"{type(error).__name__}: {error}")
        if isinstance(error, Exception):
            ranks.fail(error)
        raise
    finally:
        if shown is not progress:
            shown.close()
