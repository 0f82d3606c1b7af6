"""Hashes the data and the model of a run. A journal can only resume with the same data and the same model."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..data import Batch
from .tensors import ModelTensors


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def fingerprint_of_data(batches: Iterable[Batch] | None) -> str:
    """Returns the sha256 of the calibration inputs, or "none" without inputs."""
    if batches is None:
        return "none"
    sha = hashlib.sha256()
    for batch in batches:
        items = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
        sha.update(json.dumps([[str(k), str(v.dtype), list(v.shape), _hash(v)] for k, v in items]).encode())
    return sha.hexdigest()


def fingerprint_of_model(model: nn.Module, names: Iterable[str], tensors: ModelTensors) -> str:
    """Returns the sha256 of a model's class, settings and named tensors. It is the same from memory and from disk."""
    config = getattr(model, "config", None)
    settings = (
        {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        if hasattr(config, "to_dict")
        else {}
    )

    # The weights of a layer's experts are the largest tensors, and are joined from many: one at a time is in memory.
    experts, alone = {name for name, p in model.named_parameters() if p.dim() == 3}, threading.Lock()

    def one(name: str) -> list:
        with alone if name in experts else contextlib.nullcontext():
            tensor = tensors.load([name], torch.device("cpu"))[name]
            return [name, str(tensor.dtype), list(tensor.shape), _hash(tensor)]

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        hashes = list(pool.map(one, sorted(names)))
    described = json.dumps([type(model).__name__, settings, hashes], default=str, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()
