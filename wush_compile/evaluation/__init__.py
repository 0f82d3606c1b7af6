"""Measures what quantization costs. Public as `wush_compile.evaluate`.

language.py   perplexity, KL divergence and top-1 agreement of language models
layers.py     losses of single layers, solved with several configurations
"""

from .language import Comparison, compare, kl_divergence, perplexity
from .layers import LayerLosses, compare_layers

__all__ = ["Comparison", "LayerLosses", "compare", "compare_layers", "kl_divergence", "perplexity"]
