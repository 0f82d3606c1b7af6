"""wush_compile: accurate 4-bit inference of PyTorch models, as a compiler pass."""

from .config import WushConfig

__all__ = ["WushConfig"]
