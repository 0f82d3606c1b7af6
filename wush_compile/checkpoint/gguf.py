"""Reads GGUF files as ordinary transformers models: dequantized weights, and the tokenizer of the file's metadata."""

from pathlib import Path

import torch
from torch import nn

from ..errors import CheckpointError

# llama.cpp's pre-tokenizers that split digits before the GPT-2 regex. transformers' converter does not split them.
DIGIT_PRE_TOKENIZERS = ("smollm", "refact", "command-r", "starcoder", "codeshell", "exaone", "minerva-7b")
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf(path: str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, object]:
    """(model, tokenizer) of a GGUF file. Weights are dequantized to `dtype`; the model is on the CPU, in eval mode.

    The model is an ordinary one: `save_pretrained` and `from_pretrained` work. The file's metadata corrects two errors
    of the conversion by transformers: the digit pre-tokenizer, and the special tokens in the tokenizer, `model.config`
    and `model.generation_config`. Raises `CheckpointError` if the file is not GGUF, or is damaged.
    """
    path = Path(path)
    metadata = read_metadata(path)
    import transformers

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    # Versions without GgufConfig always dequantize.
    plain = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, **plain)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ValueError, RuntimeError, NotImplementedError, KeyError, OSError) as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load the GGUF file {path}: {error}"
        ) from error
    _make_plain(model)
    _correct_pre_tokenizer(tokenizer, metadata)
    _correct_special_tokens(model, tokenizer, metadata)
    return model.eval(), tokenizer


def read_metadata(path: str | Path) -> dict[str, object]:
    """The key-value metadata of a GGUF file, without arrays (vocabulary, merges, scores)."""
    path = Path(path)
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF files needs the package gguf: run pip install 'wush-compile[gguf]'"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: give the path of a .gguf file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not start with the bytes GGUF")
    try:
        reader = gguf.GGUFReader(path)
        return {
            name: field.contents()
            for name, field in reader.fields.items()
            if field.types[0] != gguf.GGUFValueType.ARRAY
        }
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"the GGUF file {path} is truncated or damaged ({error}): fetch it again") from error


def _make_plain(model: nn.Module) -> None:
    """Removes what `from_pretrained` leaves for its own quantizers. Otherwise saving fails or converts back."""
    for owner in (model, model.config):
        for name in ("hf_quantizer", "_weight_conversions", "quantization_method", "quantization_config"):
            if name in vars(owner):
                delattr(owner, name)
    if "is_quantized" in vars(model):
        model.is_quantized = False


def _correct_pre_tokenizer(tokenizer, metadata: dict) -> None:
    """Makes each digit a token of its own if the metadata says so, with Digits(individual_digits=True)."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    if metadata.get("tokenizer.ggml.pre") in DIGIT_PRE_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )


def _correct_special_tokens(model: nn.Module, tokenizer, metadata: dict) -> None:
    for name, key in SPECIAL_TOKENS.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            continue
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(index)))
        if name != "unk_token":
            for settings in (model.config, model.generation_config):
                setattr(settings, f"{name}_id", int(index))
