"""Saves a quantized model, all of it or nothing, and loads it after checking everything (docs/spec.md §7)."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..modules import WushGroup, install_group, unwrapped
from . import hf
from .atomic import recover, replaced_directory
from .files import CONFIG, DIGEST, JOURNAL, WEIGHT_FILE, WEIGHTS, Weights, digest, read_config, weight_files
from .fused import half_quantized
from .layout import (
    build_groups,
    check_specs,
    join_rows,
    parts,
    read_record,
    replaced_weight,
    replaces,
    split_state_dict,
)
from .record import REPORT, Quantization, read_report, write_report

log = logging.getLogger("wush_compile")


def _aliases(model: nn.Module) -> list[list[str]]:
    """For each parameter or buffer with several names (tied weights): its names."""
    names: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            names.setdefault(id(tensor), []).append(name)
    return [n for n in names.values() if len(n) > 1]


def saved_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter and persistent buffer -> its name in a checkpoint of the unquantized model."""
    aliases = _aliases(model)
    dropped = {alias for names in aliases for alias in names[1:]}
    saved = (
        hf.saved_names(model)
        if isinstance(model, transformers.PreTrainedModel)
        else [name for name in model.state_dict() if name not in dropped]
    )
    names = {name: name for name in saved}
    for tied in aliases:
        kept = next((name for name in tied if name in names), None)
        names |= dict.fromkeys(tied, kept) if kept is not None else {}
    return names


def write_settings(model: nn.Module, record: Quantization, directory: Path, sha256: str, tokenizer=None) -> None:
    """Writes everything of a checkpoint except the weights. `model` may be the unquantized one."""
    if isinstance(model, transformers.PreTrainedModel):
        hf.write_settings(model, record, directory, sha256)
    else:
        config = {"quantization_config": record.to_dict(), DIGEST: sha256}
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_report(record, directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _save_module(model: nn.Module, record: Quantization, directory: Path) -> None:
    state = split_state_dict(model)
    for name in [alias for names in _aliases(model) for alias in names[1:]]:
        state.pop(name, None)  # tied weights are saved under their first name
    storages = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            what = "has no values (meta device)" if isinstance(tensor, Tensor) else "is not a tensor"
            raise CheckpointError(f"{name} {what} and cannot be saved: move the model to one device")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    write_settings(model, record, directory, digest(record.to_dict(), state, state.__getitem__))
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def _keep_other_files(old: Path, new: Path) -> None:
    """Links other files from `old` into `new`, so that replacing a checkpoint keeps its notes and its tokenizer."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for path in old.iterdir():
        if (new / path.name).exists() or WEIGHT_FILE.fullmatch(path.name) or path.name in (JOURNAL, REPORT):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=link)
        elif path.is_symlink():
            os.symlink(os.readlink(path), new / path.name)
        else:
            link(str(path), str(new / path.name))


def save(model: nn.Module, directory: str | os.PathLike, tokenizer=None) -> None:
    """Writes the checkpoint of a quantized model (and its tokenizer's files), all of it or nothing.

    An existing checkpoint is replaced in one step: a process killed at any moment leaves the old one or the new one.
    Other files in its directory are kept. Equal models give equal bytes. Raises `WushError` for a model that is not
    quantized, and `CheckpointError` for a directory that is not empty and holds no checkpoint.
    """
    model = unwrapped(model)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            "the model has an adapter, which is no part of a checkpoint: save it with model.save_pretrained, and the "
            "model without it"
        )
    record = hf.bring_up_to_date(model)
    if halves := half_quantized(record):
        log.warning(
            "vLLM cannot serve this checkpoint: it runs %s as one linear with quantized ones (%d such places); "
            "ignore all of q_proj, k_proj and v_proj or none, and all of gate_proj and up_proj or none",
            ", ".join(halves[0]),
            len(halves),
        )
    target = recover(directory)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{directory} is a file: give a directory")
    replaces = target.exists() and any(target.iterdir())
    if replaces:
        try:
            read_config(target)
        except CheckpointError:
            raise CheckpointError(
                f"{directory} is not empty and holds no wush checkpoint: give a new directory, or empty it first"
            ) from None
    with replaced_directory(target) as new:
        if getattr(model, "hf_quantizer", None) is not None:
            model.save_pretrained(new)
            write_report(record, new)
        else:
            _save_module(model, record, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if replaces:
            _keep_other_files(target, new)


def load(
    directory: str | os.PathLike,
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    device_map: str | Mapping | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> nn.Module:
    """Loads a checkpoint: a Hugging Face model by its class, any other model into `model`. Returns the model.

    model
        An unquantized model of the same kind. Its dtype does not matter, and it may be on any device, the meta device
        included. Its tensors stay on their devices; those on the meta device go to the CPU.
    device
        Where the tensors go instead. Default for Hugging Face models: the CPU.
    device_map
        As in transformers' `from_pretrained`: `"auto"`, or the device of each module. Hugging Face models only.
    dtype
        The dtype of everything outside of the quantized linears, and of their inputs. Default: what was saved, exactly.
    variant
        The part `fp8` in the name `model.fp8.safetensors` that `save_pretrained(variant="fp8")` gave the files.

    Raises `CheckpointError` if the checkpoint is truncated, tampered with, incomplete, newer than this version, or does
    not fit the model; then the model stays as it was.
    """
    if device is not None and device_map is not None:
        raise ConfigError("device and device_map both say where a model goes: give one of them")
    if model is not None and device_map is not None:
        raise ConfigError("device_map is for Hugging Face models, which load builds itself: with model=, give device")
    path = recover(directory)
    config = read_config(path)
    settings = config["quantization_config"]
    record = read_record(settings)
    read_report(record, path)
    weights = Weights(weight_files(path, variant))
    if model is None:
        where = device_map if device is None else device
        return hf.load(path, config, weights, dtype, device_map=where, variant=variant)
    groups = build_groups(model, record, weights.specs)
    replaced = replaces(groups)
    state = {name: tensor for name, tensor in model.state_dict().items() if not replaced(name)}
    aliases = _aliases(model)
    tied = [a for names in aliases if any(n in weights.specs for n in names) for a in names]
    check_specs(weights.specs, groups, {name: tuple(tensor.shape) for name, tensor in state.items()}, tied)
    for name, tensor in model.named_buffers():
        if tensor.is_meta and name not in state:
            raise CheckpointError(
                f"the buffer {name} is on the meta device, and no checkpoint holds it because it is not "
                "persistent: build the model on a real device"
            )
    weights.verify(settings, config.get(DIGEST))
    _fill(model, groups, state, weights, aliases, None if device is None else torch.device(device))
    hf.attach(model, record)
    return model if dtype is None else model.to(dtype)


def _fill(
    model: nn.Module,
    groups: list[WushGroup],
    state: Mapping[str, Tensor],
    weights: Weights,
    aliases: list[list[str]],
    home: torch.device | None,
) -> None:
    """Puts checked tensors into a model, on the device `home`. None: on the devices of `state`."""

    def to(tensor: Tensor, device: torch.device) -> Tensor:
        # A copy: mapped memory would change with the file.
        return tensor.to(home or ("cpu" if device.type == "meta" else device), copy=True)

    for group in groups:
        device = replaced_weight(model, group).device
        for buffer, pieces in parts(group):
            joined = join_rows(group, buffer, {name: weights.tensor(name) for name, _ in pieces})
            setattr(group, buffer, to(joined, device))
    model.load_state_dict(
        {name: to(weights.tensor(name), tensor.device) for name, tensor in state.items() if name in weights.specs},
        strict=False,
        assign=True,
    )
    for names in aliases:  # assigned tensors are new objects, so they are tied again
        saved = next((n for n in names if n in weights.specs), None)
        for name in names if saved else ():
            parent, _, leaf = name.rpartition(".")
            source_parent, _, source_leaf = saved.rpartition(".")
            setattr(model.get_submodule(parent), leaf, getattr(model.get_submodule(source_parent), source_leaf))
    for group in groups:
        install_group(model, group)
