"""Other methods of quantization in the same harness, to compare with (docs/guide/evaluate.md).

methods.py    the methods with their settings; `quantize_by`
smooth.py     SmoothQuant
rotate.py     QuaRot's rotations of the residual stream
learn.py      SpinQuant's learned rotation
hadamard.py   Hadamard matrices of any size
stream.py     finds norms and the residual stream in a graph
"""

from .learn import learn_rotation
from .methods import METHODS, Method, quantize_by
from .rotate import rotate
from .smooth import smooth

__all__ = ["METHODS", "Method", "learn_rotation", "quantize_by", "rotate", "smooth"]
