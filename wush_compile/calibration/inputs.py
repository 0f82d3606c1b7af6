"""Prepares the batches for the trace and for calibration: the user's data, or text that the model samples."""

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .. import data as calibration_data
from ..config import Names, WushConfig
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
        batches, calibrates = calibration_data.normalize(_with_decoder_inputs(model, data), tokenizer, model), True
    batches = [_with_shifted_text(model, batch) for batch in batches]
    embeddings = input_embeddings(model)
    if embeddings is not None:
        calibration_data.check_token_ids(batches, embeddings.num_embeddings)
    home = next(model.parameters()).device
    return batches if home.type == "meta" else moved(batches, home), calibrates


def input_embeddings(model: nn.Module) -> nn.Embedding | None:
    """Returns the embedding of `input_ids`, if the model names one. A model with two towers may raise instead."""
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return None
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def _with_decoder_inputs(model: nn.Module, data: Iterable) -> Iterator:
    """Yields the user's batches. An encoder-decoder gets `decoder_input_ids` from `labels`, as in its training."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    for item in data if isinstance(data, Iterable) else [data]:
        given = isinstance(item, Mapping) and isinstance(item.get("labels"), Tensor)
        if given and shift is not None and "decoder_input_ids" not in item:
            item = {**item, "decoder_input_ids": shift(labels=item["labels"])}
        yield item


def _with_shifted_text(model: nn.Module, batch: Batch) -> Batch:
    """Gives the decoder of a text-to-text model the encoder's text, shifted right, if the batch has nothing for it."""
    if not isinstance(batch, Mapping) or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return batch
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" not in accepted or "input_ids" not in batch or any(n.startswith("decoder_") for n in batch):
        return batch
    if not _shares_vocabulary(model.config):
        return batch
    ids, start = batch["input_ids"], getattr(model.config, "decoder_start_token_id", None)
    first = torch.full_like(ids[:, :1], 0 if start is None else start)
    shifted = torch.cat([first, ids[:, :-1]], 1)
    mask = batch.get("attention_mask")
    # A token follows those before it: the decoder's rows are masked where the encoder's are.
    return {**batch, "decoder_input_ids": shifted} | ({} if mask is None else {"decoder_attention_mask": mask})


def _shares_vocabulary(config: object) -> bool:
    """Whether the decoder reads the encoder's tokens. That of a text-to-speech model reads codes of sound."""
    sides = [getattr(config, f"{side}_config", None) or getattr(config, side, None) for side in ("encoder", "decoder")]
    return len({size for side in sides if (size := getattr(side, "vocab_size", None)) is not None}) < 2


def moved(batches: list[Batch], device: torch.device) -> list[Batch]:
    """Returns the batches on a device."""

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, Tensor) else value

    return [{k: move(v) for k, v in b.items()} if isinstance(b, dict) else tuple(map(move, b)) for b in batches]


def _needs_data(model: nn.Module, config: WushConfig) -> bool:
    """Tells whether the recipe of any module that may be quantized needs calibration data."""
    names: list[Names] = [n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
    names += [(n, n.rpartition(".")[0]) for n, p in model.named_parameters() if p.dim() == 3]  # experts
    recipes = {config.recipe_of(name) for name in names if not config.ignores(name)}
    return any(recipe.needs_data for recipe in recipes | {config.recipe})


def _without_data(
    model: nn.Module, config: WushConfig, tokenizer, progress: bool, device: torch.device, journal: Journal | None
) -> tuple[list[Batch], bool]:
    """Returns (batches for the trace, whether to calibrate on them) if the user gave no data."""
    if input_embeddings(model) is not None and not _needs_data(model, config):
        return [{"input_ids": torch.zeros((2, 8), dtype=torch.int64)}], False
    if not getattr(model, "can_generate", lambda: False)():
        raise DataError(
            f"{type(model).__name__} cannot sample its own calibration text: pass data, an iterable of its inputs"
        )
    if next(model.parameters()).is_meta:
        raise DataError(
            "a streamed or offloaded model cannot sample its own calibration text: pass data, or load all of it"
        )

    def sample() -> dict[str, Tensor]:
        with _on_device(model, device):
            windows = calibration_data.sample_calibration_text(
                model, tokenizer, *SELF_WINDOWS, seed=config.seed, progress=progress
            )
            return {"sampled": torch.cat(windows).cpu()}

    texts = sample() if journal is None else journal.remember("sampled", sample)
    return calibration_data.normalize(texts["sampled"].split(1), model=model), True


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
