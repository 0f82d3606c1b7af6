"""Mean and inverse deviation of a norm's rows, added up in one order for any number of rows and warps."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ..common.overlap import start_next, wait_inputs

SEGMENT = 1024  # columns of a row that are added side by side: 16 bytes for 128 threads
DEPTH = tl.constexpr(10)  # of the tree that adds up a segment: SEGMENT = 2^DEPTH
LOADS = 16  # of 16 bytes each, that a thread of a statistics program has in flight


class Sums(NamedTuple):
    """What the sums over rows are compiled for, one compile-time constant as `Spec`."""

    width: int  # channels of a row (K)
    rows: int  # that a program adds up
    steps: int  # segments of a row that are loaded before the first is added
    centered: bool  # mean and variance; else the mean of squares alone
    eps_tensor: bool  # eps is a pointer to one number
    sm: int  # as `Spec.sm`
    segment: int = SEGMENT


def steps(width: int, rows: int, warps: int) -> int:
    """Segments of a row that a program of so many rows and warps loads at once."""
    return max(1, min(LOADS * warps * 256 // (SEGMENT * rows), triton.cdiv(width, SEGMENT)))


@triton.jit
def row_sum(pointers, others, shift, SQUARES: tl.constexpr, CENTERED: tl.constexpr, SUMS: tl.constexpr):
    """fp32 [ROWS]: sums of the rows at `pointers` [ROWS, 1], plus those at `others` unless None; of squares if SQUARES;
    of the values less `shift` [ROWS] if CENTERED.

    Each of the segment's columns first adds its own values in turn, then a tree of neighbours adds the columns. A sum
    of two has no order, so the result is the same for any number of rows and warps."""
    K: tl.constexpr = SUMS.width
    ROWS: tl.constexpr = SUMS.rows
    STEPS: tl.constexpr = SUMS.steps
    WIDTH: tl.constexpr = SUMS.segment
    SPAN: tl.constexpr = WIDTH * STEPS
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for k in tl.range(0, K, SPAN, num_stages=1):
        columns = k + tl.arange(0, WIDTH)[None, :]
        values = ()
        for i in tl.static_range(STEPS):  # all loads first
            if K % SPAN == 0:
                values += (tl.load(pointers + (columns + i * WIDTH)),)
            else:
                values += (tl.load(pointers + (columns + i * WIDTH), mask=columns + i * WIDTH < K, other=0.0),)
        for i in tl.static_range(STEPS):
            value = values[i].to(tl.float32)
            if others is not None:
                inside = columns + i * WIDTH < K
                value += tl.load(others + (columns + i * WIDTH), mask=inside, other=0.0).to(tl.float32)
            if CENTERED:
                value -= shift[:, None]
                if K % SPAN != 0:
                    value = tl.where(columns + i * WIDTH < K, value, 0.0)
            if SQUARES:
                total = tl.fma(value, value, total)
            else:
                total += value
    for i in tl.static_range(DEPTH):
        total = tl.sum(tl.reshape(total, (ROWS, WIDTH >> (i + 1), 2)), axis=2)
    return tl.reshape(total, (ROWS,))


@triton.jit
def row_statistics(pointers, others, eps, SUMS: tl.constexpr):
    """(mean, scale), fp32 [ROWS] each, of the rows at `pointers` [ROWS, 1], plus those at `others` unless None: 0 and
    rsqrt(mean(x^2) + eps), or, if centered, the mean and rsqrt(variance + eps)."""
    K: tl.constexpr = SUMS.width
    ROWS: tl.constexpr = SUMS.rows
    if SUMS.eps_tensor:
        eps = tl.load(eps).to(tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    if SUMS.centered:
        mean = row_sum(pointers, others, mean, False, False, SUMS) * (1.0 / K)
    square = row_sum(pointers, others, mean, True, SUMS.centered, SUMS) * (1.0 / K)
    if SUMS.sm > 0:
        return mean, libdevice.rsqrt(square + eps)
    else:
        return mean, tl.div_rn(1.0, tl.sqrt_rn(square + eps))  # the interpreter has no library


@triton.jit
def store_statistics(program, x, up, eps, mean, scale, M, stride, up_stride, SUMS: tl.constexpr):
    """`row_statistics` of the rows of x, plus up unless None, from program*ROWS on, to mean (None: not centered) and
    scale, fp32 [M] each."""
    rows = program.to(tl.int64) * SUMS.rows + tl.arange(0, SUMS.rows)
    rows_there = tl.minimum(rows, M - 1)
    others = None
    if up is not None:
        others = up + (rows_there * up_stride)[:, None]
    means, scales = row_statistics(x + (rows_there * stride)[:, None], others, eps, SUMS)
    if SUMS.centered:
        tl.store(mean + rows, means, mask=rows < M)
    tl.store(scale + rows, scales, mask=rows < M)


@triton.jit(do_not_specialize=["M"])
def row_statistics_kernel(x, up, eps, mean, scale, M, pitch, up_pitch, SUMS: tl.constexpr, PDL: tl.constexpr):
    """x [M, K], rows `pitch` apart, plus up unless None -> mean (None: not centered), scale fp32 [M]; grid (M/ROWS)."""
    start_next(PDL)
    wait_inputs(PDL)
    store_statistics(tl.program_id(0), x, up, eps, mean, scale, M, pitch, up_pitch, SUMS)
