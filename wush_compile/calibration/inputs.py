"""Prepares the batches for the trace and for calibration: the user's data, or text that the model samples."""

import contextlib
import logging
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import data as calibration_data
from ..config import WushConfig, ignored_by
from ..data import Batch
from ..errors import DataError
from .journal import Journal

log = logging.getLogger("wush_compile")
# (windows, tokens in each window) that a language model samples if there are no data.
SELF_WINDOWS = (64, 512)


def prepare_batches(
    model: nn.Module,
    data: Iterable | None,
    config: WushConfig,
    tokenizer,
    progress: bool,
    device: torch.device,
    journal: Journal | None,
) -> tuple[list[Batch], bool]:
    """Returns (batches on the model's device, whether to calibrate on them)."""
    if data is None:
        batches, calibrates = _without_data(model, config, tokenizer, progress, device, journal)
    else:
        batches, calibrates = calibration_data.normalize(data, tokenizer, model), True
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding):
        calibration_data.check_token_ids(batches, embeddings.num_embeddings)
    home = next(model.parameters()).device
    return batches if home.type == "meta" else moved(batches, home), calibrates


def moved(batches: list[Batch], device: torch.device) -> list[Batch]:
    """Returns the batches on a device."""

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return [{k: move(v) for k, v in b.items()} if isinstance(b, dict) else tuple(map(move, b)) for b in batches]


def _needs_data(model: nn.Module, config: WushConfig) -> bool:
    """Tells whether the recipe of any module that may be quantized needs calibration data."""
    names = (name for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor))
    recipes = {config.recipe_of(name) for name in names if not ignored_by(name, config.ignore)}
    return any(recipe.needs_data for recipe in recipes | {config.recipe})


def _without_data(
    model: nn.Module, config: WushConfig, tokenizer, progress: bool, device: torch.device, journal: Journal | None
) -> tuple[list[Batch], bool]:
    """Returns (batches for the trace, whether to calibrate on them) if the user gave no data."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(embeddings, nn.Embedding) and not _needs_data(model, config):
        return [{"input_ids": torch.zeros((2, 8), dtype=torch.int64)}], False
    if not getattr(model, "can_generate", lambda: False)():
        raise DataError(
            f"{type(model).__name__} cannot sample its own calibration text: pass data, an iterable of its inputs"
        )
    if next(model.parameters()).is_meta:
        raise DataError("a streamed model cannot sample its own calibration text: pass data, or do not stream")

    def sample() -> Tensor:
        with _on_device(model, device):
            windows = calibration_data.sample_calibration_text(
                model, tokenizer, *SELF_WINDOWS, seed=config.seed, progress=progress
            )
            return torch.cat(windows).cpu()

    texts = sample() if journal is None else journal.remember("sampled", sample)  # [windows, tokens]
    return calibration_data.normalize(texts.split(1), model=model), True


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves the model to a device for the block if all of it fits, because generation needs all layers at once."""
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
