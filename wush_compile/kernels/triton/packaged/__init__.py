"""The ops as graphs of Triton launches, for programs without Python: AOTInductor compiles the kernels into the package.

A kernel suits a band of row counts M, while a program serves every M. So the graph holds one launch for each band, with
a grid that is empty outside the band; an empty grid is not launched. Bands that the program's shapes exclude have no
launch. A product of the library cannot be skipped in this way: it stands in one branch of `torch.cond`, the launches in
the other, and the host takes one of them by M.

    launches.py   how a launch gets into a graph; what is known of the device and of the weights
    quantize.py   transform_quantize
    linear.py     fp4_linear: the same kernels as in `linear.launch`
    library.py    its products by the library
    grouped.py    fp4_grouped_linear
    operands.py   activations as the products read them

Gluon's kernels are missing: docs/guide/compile.md says why.
"""

import functools

from torch import Tensor

from ....ops.schema import bind, check
from ..common.memory import fits_e4m3, is_power_of_two
from ..provider import IMPLEMENTATIONS
from .grouped import fp4_grouped_linear
from .launches import Known
from .linear import fp4_linear
from .quantize import transform_quantize

PACKAGED = {
    "transform_quantize": transform_quantize,
    "fp4_linear": fp4_linear,
    "fp4_grouped_linear": fp4_grouped_linear,
}
for op, function in PACKAGED.items():
    check(op, "the packaged function", functools.partial(function, Known((0, 0))))  # what is known comes first


def known(capability: tuple[int, int], processors: int, call: dict, tensors: dict[str, Tensor | None]) -> Known:
    """What decides between the kernels of a call. tensors: of the call's tensors those that never change, else None."""
    scales, powers = tensors.get("weight_scales"), ("global_scale", "weight_global_scale")
    fits = call["format"] == "mxfp4" and scales is not None and scales.dim() == 2 and fits_e4m3(scales)
    given = [tensors[name] for name in powers if name in tensors]
    return Known(capability, processors, fits, all(g is not None and is_power_of_two(g) for g in given))


def refuses(op: str, *args) -> str | None:
    """Why a call cannot be packaged as Triton launches; None if it can."""
    call = bind(op, args)
    if call["scale_layout"] != "rows":
        return f"packaged kernels take scales in rows, not {call['scale_layout']}"
    if call["format"] == "int4" and call.get("activation_format", "same") != "same":
        return "int4 weights are decoded by arithmetic"
    return IMPLEMENTATIONS[op].refuses(*args)
