"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass.

import wush_compile as wc
model = wc.quantize(model, data)          # W4A4, in place
wc.save(model, directory); model = wc.load(directory)
print(wc.explain(model))
torch.compile(model, backend="wush")

A name is imported when it is first used: a command that prints its help, or a server that only needs the ops, does not
wait for the rest. The import alone gives torch the ops, and lets transformers load checkpoints.
"""

import importlib
from typing import TYPE_CHECKING

from .when_imported import import_first, when_imported

if TYPE_CHECKING:
    from . import evaluation as evaluate
    from .backend import fuse
    from .calibration.progress import Progress
    from .calibration.recommend import recommend
    from .calibration.run import quantize, quantize_checkpoint
    from .checkpoint.save_load import load, save
    from .checkpoint.source import load_model, load_tokenizer
    from .config import WushConfig
    from .data import windows
    from .errors import WushError
    from .graphs.log import trace_graphs
    from .reporting.explain import explain
    from .reporting.page import report

__version__ = "0.1.0"
__all__ = [
    "Progress",
    "WushConfig",
    "WushError",
    "evaluate",
    "explain",
    "fuse",
    "load",
    "load_model",
    "load_tokenizer",
    "quantize",
    "quantize_checkpoint",
    "recommend",
    "report",
    "save",
    "trace_graphs",
    "windows",
]

_MODULES = {
    ".backend": ("fuse",),
    ".calibration.progress": ("Progress",),
    ".calibration.recommend": ("recommend",),
    ".calibration.run": ("quantize", "quantize_checkpoint"),
    ".checkpoint.save_load": ("load", "save"),
    ".checkpoint.source": ("load_model", "load_tokenizer"),
    ".config": ("WushConfig",),
    ".data": ("windows",),
    ".errors": ("WushError",),
    ".graphs.log": ("trace_graphs",),
    ".reporting.explain": ("explain",),
    ".reporting.page": ("report",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    if name == "evaluate":
        found = importlib.import_module(".evaluation", __name__)
    elif name in _HOME:
        found = getattr(importlib.import_module(_HOME[name], __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


import_first("torch", __name__, besides=("__main__", "cli", "errors", "when_imported"))
# The ops with their GPU kernels, and the quantization method "wush" of `from_pretrained`.
when_imported("torch", lambda: importlib.import_module(".kernels.register", __name__))
when_imported("transformers.modeling_utils", lambda: importlib.import_module(".checkpoint.hf", __name__))
