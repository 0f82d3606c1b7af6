"""Starting a kernel while the one in front of it still runs (programmatic dependent launch, sm_90 and later).

One rule keeps it safe: before `wait_inputs` a kernel neither reads nor writes memory; it only asks for the weights it
will need (`prefetch`), so that they travel while the quantizer in front is at work. When `wait_inputs` returns, all
kernels in front have ended, since each of them waited too.
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


@triton.jit
def prefetch(pointer, offset):
    """Asks for the cache lines `offset` (int64 tensor) bytes after a pointer; nothing is read."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l",
                              [pointer.to(tl.int64, bitcast=True) + offset], dtype=tl.int32, is_pure=False, pack=1)
