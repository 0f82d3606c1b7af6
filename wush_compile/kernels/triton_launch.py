"""Starting a kernel while the one in front of it still runs (programmatic dependent launch, sm_90 and later).

Two rules keep it safe. Before `wait_inputs` a kernel writes nothing, and reads nothing but a weight that was there
before its predecessor was launched (`triton_memory.settled`). `start_next` comes after it, so that a kernel runs
beside its direct predecessor at most: early in the quantizers, for `gemv` to read its weights meanwhile, at the end
elsewhere, since programs that are placed early crowd on the multiprocessors that are free. When `wait_inputs`
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
