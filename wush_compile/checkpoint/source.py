"""Loads the model that a user names: a directory, a checkpoint of ours, a GGUF file, or a name on the hub."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import safetensors
import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME

from ..errors import CheckpointError
from . import hf
from .files import CONFIG
from .gguf import load_gguf
from .save_load import load

TOKENIZER_FILE = re.compile(r"tokeniz|vocab|merges|bpe|spiece|sentencepiece|tekken|.*\.(model|tiktoken)$")


@contextlib.contextmanager
def _loading(source: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns what transformers raises for a source that it cannot load into a `CheckpointError` of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise CheckpointError(f"transformers cannot load the {what} of {source}: {first.rstrip(':.')}") from error


def _configuration(source: str | os.PathLike) -> transformers.PreTrainedConfig:
    """The configuration of a local directory or a name on the hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{source} has no {CONFIG}: give the directory of a model")
    elif path.is_absolute() or path.parts[:1] in ((".",), ("..",), ("~",)) or len(path.parts) > 2:
        raise CheckpointError(f"there is no directory {source}: give that of a model, or its name on the hub")
    with _loading(source, "configuration"):
        return transformers.AutoConfig.from_pretrained(source)


def _class_of(source: str | os.PathLike, config: transformers.PreTrainedConfig) -> type:
    """The class that a configuration names. The causal language model if it names none that transformers has."""
    kind = hf.class_named(config.architectures)
    if kind is None and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        names = ", ".join(config.architectures or ()) or "no class in architectures"
        raise CheckpointError(
            f"{source} has {names}, which transformers {transformers.__version__} does not have: load it with its own "
            "class, and give the model to wush_compile.quantize"
        )
    return kind or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _some(names: Iterable[str]) -> str:
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_complete(source: str | os.PathLike, kind: type, missing: Iterable[str], left_over: Iterable[str]) -> None:
    """Raises `CheckpointError` if a model lacks weights in its files, or leaves weights of the files out."""
    for names, has in ((missing, "lacks"), (left_over, "has besides")):
        if names:
            raise CheckpointError(
                f"{source} {has} the weights of a {kind.__name__}: {_some(names)}; load it with its own class, and "
                "give the model to wush_compile.quantize"
            )


def ignores(model: nn.Module, name: str) -> bool:
    """Whether transformers loads a model without a word although its files have this tensor besides."""
    patterns = (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq")
    return any(re.search(pattern, name) for pattern in patterns)


def load_model(source: str | os.PathLike, dtype: str | torch.dtype = "auto") -> tuple[nn.Module, object]:
    """(model, its tokenizer or None) from a local directory or checkpoint, a GGUF file, or a name on the hub.

    The model is of the class that its `config.json` names in `architectures`. Raises `CheckpointError` if its files
    lack weights of that class, or have others besides, which transformers only reports.
    """
    path = Path(source)
    if path.is_file():
        return load_gguf(path) if dtype == "auto" else load_gguf(path, dtype)
    config = _configuration(source)
    if (getattr(config, "quantization_config", None) or {}).get("quant_method") == hf.QUANT_METHOD and path.is_dir():
        model = load(path, dtype=None if dtype == "auto" else dtype)
    else:
        kind = _class_of(source, config)
        with _loading(source, "weights"):
            model, info = kind.from_pretrained(source, dtype=dtype, output_loading_info=True)
        check_complete(source, kind, info["missing_keys"], info["unexpected_keys"])
    return model, tokenizer_or_none(source)


def tokenizer_or_none(source: str | os.PathLike):
    """`load_tokenizer`, or None for a model of images, of sound, or without its tokenizer's files."""
    try:
        return load_tokenizer(source)
    except CheckpointError:
        return None


def load_tokenizer(source: str | os.PathLike):
    """The tokenizer of a local directory or of a name on the hub. Raises `CheckpointError` if there is none."""
    path = Path(source)
    if path.is_dir() and not any(TOKENIZER_FILE.match(file.name) for file in path.iterdir()):
        # transformers would make one from the class's defaults, with a vocabulary of its special tokens.
        raise CheckpointError(f"{source} has no files of a tokenizer: save the model's tokenizer there too")
    with _loading(source, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source)


def empty_model(directory: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model of a directory's `config.json`, with its buffers; its weights are on the meta device.

    `dtype` holds if the configuration names none.
    """
    config = _configuration(directory)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{directory} is already quantized: start again from the original model")
    kind = _class_of(directory, config)
    with _loading(directory, "class"), init_empty_weights(include_buffers=False):
        model = kind._from_config(config, dtype=config.dtype or dtype)
    model.tie_weights()  # above, every name got a tensor of its own
    if (directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model.eval()
