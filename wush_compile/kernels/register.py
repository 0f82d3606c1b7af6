"""Puts the providers behind the ops on CUDA devices; elsewhere, and for what no provider takes, the reference stays."""

import functools

from .. import ops
from . import dispatch


@functools.cache
def register() -> None:
    """Registers `dispatch` as the CUDA implementation of every op that a provider may have; once a process."""
    for name in ("transform_quantize", "fp4_linear"):
        ops.lib.impl(name, functools.partial(dispatch, name, ops.REFERENCE[name]), "CUDA")


register()
