"""Launches of Triton kernels in a graph that is traced, each for a band of row counts (`__init__.py` says why)."""

import functools
import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import (
    TraceableTritonKernelWrapper,
    TracingTritonHOPifier,
    triton_kernel_wrapper_functional,
)
from torch.fx.experimental.symbolic_shapes import statically_known_true

# Most rows of each band but the last, which is open. The kernel chosen for that number serves the whole band.
BANDS = (1, 16, 64, 128)
# The number of rows for which the kernel of the last band is chosen, as a multiple of the most of the one before.
MANY = 32
# Kernel parameters that every packaged launch switches off: the overlap with the previous kernel (PDL), stores in
# assembly, which Inductor cannot analyse (WORDS), and sums in smaller steps (PROMOTE).
PLAIN = {"PDL": False, "WORDS": 0, "PROMOTE": 0}


class Known(NamedTuple):
    """What decides between kernels besides shapes and dtypes."""

    capability: tuple[int, int]  # of the device
    multiprocessors: int = 132
    fits_e4m3: bool = False  # the weight's rows fit e4m3 (MXFP4; `common.memory.row_facts`)
    exact: bool = False  # each global scale is absent or a power of two


class _Functional(TracingTritonHOPifier):
    """Traces a launch as `torch.library.wrap_triton` does, but as a functional call.

    writes    the kernel's outputs by name. Nothing is inferred from its code, and dead-code elimination knows what the
              launch computes.
    """

    def __init__(self, writes: tuple[str, ...]):
        self.writes = writes

    def call_HOP(self, variable, grids, combined_args, tx):
        arguments, index = self.store_non_graphable_args(combined_args)
        return triton_kernel_wrapper_functional(
            kernel_idx=variable.kernel_idx,
            constant_args_idx=index,
            grid=grids,
            tma_descriptor_metadata={},
            kwargs=arguments,
            tensors_to_clone=[name for name in self.writes if name in arguments],
        )


def launch(kernel, writes: tuple[str, ...], grid: tuple, warps: int, stages: int = 3, **arguments) -> dict[str, Tensor]:
    """Adds a launch to the graph that is traced; parameter's name -> tensor, for the parameters that it writes."""
    arguments = {name: PLAIN[name] for name in kernel.arg_names if name in PLAIN} | arguments
    if sorted(arguments) != sorted(kernel.arg_names):
        raise TypeError(f"{kernel.__name__} takes {kernel.arg_names}, not {sorted(arguments)}")
    launched = TraceableTritonKernelWrapper(kernel, None, grid)
    return _Functional(writes).call_triton_kernel(
        launched, (), {**arguments, "num_warps": warps, "num_stages": stages}, None
    )


def in_band(rows, first: int, last: int | None):
    """1 if first <= rows <= last, else 0: a number if `rows` is one, else an expression.

    A traced dimension is assumed to be at least 2, but the program must be right for 0 and 1. So only upper bounds of a
    dynamic dimension are used. For rows = 0 the number of tiles is 0, which already empties the grid.
    """
    if isinstance(rows, int):
        return 1
    inside = 1
    if first > 1:
        inside = torch.sym_min(inside, rows - (first - 1))
    if last is not None and not statically_known_true(rows <= last):
        inside = torch.sym_min(inside, last + 1 - rows)
    return torch.sym_max(0, inside)


def band_rows(limits: tuple[int, ...] = BANDS) -> list[int]:
    """The number of rows for which the kernel of each band is chosen."""
    return [*limits, MANY * limits[-1]]


def bands(rows, kernel_for, limits: tuple[int, ...] = BANDS) -> list[tuple]:
    """(first, last, kernel) of the bands that `rows` can be in; neighbours with the same kernel are joined."""
    found: list[tuple] = []
    for first, last, chosen in zip([1, *(most + 1 for most in limits)], [*limits, None], band_rows(limits)):
        if isinstance(rows, int) and not first <= rows <= (last or rows) or statically_known_true(rows < first):
            continue
        kernel = kernel_for(chosen)
        if found and found[-1][2] == kernel:
            first = found.pop()[0]
        found.append((first, last, kernel))
    return found


def outside(rows, kept: list[tuple[int, int | None]], most: int | None):
    """Whether `rows` is in none of the bands (first, last), all of them below `most`: a bool if `rows` is a number,
    else an expression. It says nothing of 0 rows. As in `in_band` no lower bound is asked for at 1."""
    gaps, after = [], 1
    for first, last in kept:
        gaps += [rows == m for m in range(after, first)]
        after = last + 1
    return functools.reduce(operator.or_, gaps, rows > most)


def tiles(n, size: int):
    return (n + size - 1) // size


def dense(t: Tensor) -> Tensor:
    aligned = t.storage_offset() * t.element_size() % 16 == 0
    return t if aligned and t.is_contiguous() else t.clone(memory_format=torch.contiguous_format)
