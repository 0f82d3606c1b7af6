"""Starting a kernel while the one in front of it still runs (programmatic dependent launch, sm_90 and later).

Two rules keep it safe. Before `wait_inputs` a kernel writes nothing, and reads nothing but a weight that was there
before its predecessor was launched (`triton_memory.settled`). `start_next` comes after it, so that a kernel runs
beside its direct predecessor at most: early in the quantizers, for `gemv` to read its weights meanwhile, at the end
elsewhere (`hopper` reads its first weights then), since programs that are placed early crowd on the multiprocessors that are free. When `wait_inputs`
returns, all kernels in front have ended, since each of them waited too.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def overlaps(device: int) -> bool:
    """Whether kernels of a CUDA device are launched this way."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def start_next(PDL: tl.constexpr):
    """Lets the next kernel start, once every program of this one has come here or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_inputs(PDL: tl.constexpr):
    """Returns when the kernels in front have ended and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


# A counter of arrivals holds in its low half how many programs have arrived, in its high half how many came to wait.
_WAITING = tl.constexpr(1 << 16)


@triton.jit
def arrive(counter):
    """Lets those that wait at the counter read what this program has written."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait_arrivals(arrivals):
    """arrivals: (counter, programs to arrive, programs to wait), each at most 32767. Returns when all of the former
    have arrived and what they wrote can be read. The counter is int32, zero before the first comes and after the last.

    Programs are placed in the order of their numbers, on which CUB's scan relies too, though CUDA does not promise it.
    So a program may wait for lower numbers of its own launch, however little of the GPU is free: they have a place
    already. Waiting for a higher number could last forever, since what waits holds the place that it needs."""
    counter, expected, waiting = arrivals
    mine = tl.atomic_add(counter, _WAITING, sem="acquire") + _WAITING
    seen = mine
    # The last to come sets the counter back, maybe before the others have seen it full.
    while (seen >= _WAITING) & (seen % _WAITING < expected):
        seen = tl.atomic_add(counter, 0, sem="acquire")
    if mine // _WAITING == waiting:
        tl.atomic_xchg(counter, 0, sem="acq_rel")
