"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass."""

from .config import WushConfig
from .errors import WushError
from .quantizer import quantize

__all__ = ["WushConfig", "WushError", "quantize"]
