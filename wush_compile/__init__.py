"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass.

    import wush_compile as wc
    model = wc.quantize(model, data)          # W4A4, in place
    wc.save(model, directory); model = wc.load(directory)
    print(wc.explain(model))
    torch.compile(model, backend="wush")
"""

from .evaluation import language as evaluate  # noqa: F401  (hf: Hugging Face loads our checkpoints once this package is imported)
from .checkpoint import hf
from .backend import fuse
from .config import WushConfig
from .errors import WushError
from .report.explain import explain
from .kernels import register as _providers  # noqa: F401  (puts the GPU kernels behind the ops)
from .calibration.run import quantize, quantize_checkpoint
from .checkpoint.save_load import load, save
from .graphs.log import trace_graphs

__all__ = [
    "WushConfig", "WushError", "evaluate", "explain", "fuse", "load", "quantize", "quantize_checkpoint", "save", "trace_graphs",
]
