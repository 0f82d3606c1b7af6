"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass."""

from . import hf  # noqa: F401  (registers the method "wush" with transformers)
from .checkpoint import load, save
from .config import WushConfig
from .errors import WushError
from .quantizer import quantize

__all__ = ["WushConfig", "WushError", "load", "quantize", "save"]
