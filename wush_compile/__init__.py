"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass.

import wush_compile as wc
model = wc.quantize(model, data)          # W4A4, in place
wc.save(model, directory); model = wc.load(directory)
print(wc.explain(model))
torch.compile(model, backend="wush")
"""

from . import evaluation as evaluate
from .backend import fuse
from .calibration.progress import Progress
from .calibration.run import quantize, quantize_checkpoint
from .checkpoint import hf as _hf  # noqa: F401  (lets transformers load our checkpoints)
from .checkpoint.save_load import load, load_model, load_tokenizer, save
from .config import WushConfig
from .data import windows
from .errors import WushError
from .graphs.log import trace_graphs
from .kernels import register as _providers  # noqa: F401  (registers the GPU kernels of the ops)
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
    "report",
    "save",
    "trace_graphs",
    "windows",
]
