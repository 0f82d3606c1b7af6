"""Overlap of kernels: a kernel starts while the one in front of it still runs (programmatic dependent launch, sm_90 and
later), and programs of one launch wait for each other.

Two rules keep the early start safe:

- Before `wait_inputs` a kernel writes nothing, and reads nothing but a weight that was complete before the kernel in
  front   was launched (`memory.mark_used_and_were_settled`).
- `start_next` comes after `wait_inputs`. So a kernel runs beside its direct predecessor at most. When `wait_inputs`
  returns, all kernels in front have ended, since each of them waited too.

The quantizers call `start_next` early, so that `gemv` reads its weights meanwhile. The other kernels call it at their
end, because programs that are placed early crowd on the multiprocessors that are free; `hopper` then reads its first
weights.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def overlaps(device: int) -> bool:
    """Whether kernels of a CUDA device are launched with an early start."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def start_next(PDL: tl.constexpr):
    """Lets the next kernel start, once every program of this kernel has called this or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_inputs(PDL: tl.constexpr):
    """Returns when the kernels in front have ended and their results can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


# The low half of a counter counts the programs that have arrived, the high half those that came to wait.
_WAITING = tl.constexpr(1 << 16)


@triton.jit
def arrive(counter):
    """Lets the programs that wait at the counter read what this program has written."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait_arrivals(arrivals):
    """arrivals: (counter, programs to arrive, programs to wait), each number at most 32767. Returns when all of the
    former have arrived and their results can be read. The counter is int32, zero before the first comes and after the
    last.

    A program may wait for lower numbers of its own launch, however little of the GPU is free: GPUs place programs in
    the order of their numbers, so those have a place already. CUDA does not promise this order; CUB's scan relies on
    it too. Waiting for a higher number could last forever, since the program that waits holds the place that the other
    needs."""
    counter, expected, waiting = arrivals
    mine = tl.atomic_add(counter, _WAITING, sem="acquire") + _WAITING
    seen = mine
    # The last program to come resets the counter, maybe before the others have seen it full.
    while (seen >= _WAITING) & (seen % _WAITING < expected):
        seen = tl.atomic_add(counter, 0, sem="acquire")
    if mine // _WAITING == waiting:
        tl.atomic_xchg(counter, 0, sem="acq_rel")
