"""Puts the providers behind the ops on CUDA devices and CPUs. The reference serves calls that none takes."""

import functools

from ..ops import core as ops
from ..ops.fused import FUSED_REFERENCE
from ..ops.grouped import GROUPED_REFERENCE
from ..ops.schema import lib, refuse_gradients
from . import cpu
from .dispatch import dispatch


@functools.cache
def register() -> None:
    """Registers `dispatch` as the implementation of every op, once a process."""
    for name, reference in (ops.REFERENCE | FUSED_REFERENCE | GROUPED_REFERENCE).items():
        for device in ("CUDA", "CPU") if name in cpu.IMPLEMENTATIONS else ("CUDA",):
            lib.impl(name, refuse_gradients(name, functools.partial(dispatch, name, reference)), device)


register()
