"""Renderers of the tables and numbers that documents show: a result of benchmarks/results/ in, Markdown out.

A renderer is a small function decorated with `@figure`; documents call it by name (figures.py). Its arguments are
strings, the first ones names of results. All rounding is done by `shown`.
"""

from . import accuracy, coverage, experts, products, quantizers  # noqa: F401  (each registers its renderers)
from .common import FIGURES, RESULTS, result, shown
from .products import layers_of

__all__ = ["FIGURES", "RESULTS", "layers_of", "result", "shown"]
