"""What transformers does not ask a quantizer when it saves: two of its functions, wrapped.

`save_pretrained` of a model first brings the record up to date. Only there can a model whose submodule was quantized
get a record, for it has no quantizer. `config.json` gets keys that transformers leaves out.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

WRAPPED = "_wush_compile_wraps"


def _wrap(owner: type, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replaces a method by `make(method)`, once: if the file is reloaded, the method itself is wrapped again."""
    method = getattr(owner, name)
    method = getattr(method, WRAPPED, method)
    wrapper = functools.wraps(method)(make(method))
    setattr(wrapper, WRAPPED, method)
    setattr(owner, name, wrapper)


def wrap_saving(prepare: Callable[[PreTrainedModel], object], extra: Callable[[PreTrainedConfig], Mapping]) -> None:
    """Calls `prepare(model)` before a model is saved, and adds the keys of `extra(config)` to a `config.json`."""

    def save_pretrained(method: Callable) -> Callable:
        def save(self, *args, **kwargs):
            prepare(self)
            return method(self, *args, **kwargs)

        return save

    def to_json_file(method: Callable) -> Callable:
        def write(self, json_file_path: str | os.PathLike, *args, **kwargs):
            method(self, json_file_path, *args, **kwargs)
            if keys := extra(self):
                path = Path(json_file_path)
                contents = json.loads(path.read_text(encoding="utf-8")) | keys
                path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        return write

    _wrap(PreTrainedModel, "save_pretrained", save_pretrained)
    _wrap(PreTrainedConfig, "to_json_file", to_json_file)
