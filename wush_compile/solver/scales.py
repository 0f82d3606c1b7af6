"""Global scales (docs/spec.md §4): one fp32 factor a tensor, fixed before anything is rounded."""

import math

import torch
from torch import Tensor

from .. import formats

# The authors' constants. That of mxfp4 goes with their scale rule (`paper`).
PAPER_GLOBAL_SCALE = {"mxfp4": 3.0, "nvfp4": 10.0}
# The figures below come from benchmarks/trial_global_scale.py (benchmarks/results/trial_global_scale_cpu.json, absmax).
# In its activations one token in 500 is 10 to 10^4 times the others, and at test time three times that.

# The largest known value may grow by this factor before its scale saturates. Unseen tokens and GPTQ's updates make it
# grow. In the trial it grows threefold. In the mean of all cases, outlying tokens then have 1.12 times the error of the
# best choice (3.4 times with a headroom of 1, 1.00 with 4), and ordinary tokens 1.01 times (1.00 and 1.04).
HEADROOM = 2.0
# The scale of the median group, if the largest leaves room: nearly ten octaves below saturation, five above e4m3's
# subnormals. Gaussian groups keep their relative error (.0091) from 2^-6 to 2^8. It is .010, .014, .015 at 2^-7, 2^-8,
# 2^-10, but .029, .19, .47 at 2^9, 2^10, 2^11: saturation is by far the worse end.
MEDIAN_SCALE = 0.5

# How a g that depends on data is chosen; `global_scale` explains the methods. "median" and "amax" cost ordinary tokens
# the same. In the mean, outlying tokens have 1.12 times the error of the best choice with "median", 1.25 times with
# "amax", and 10 times with "rms".
GLOBAL_SCALE_METHOD = "median"


def calibrates_global_scale(format: str, rule: str) -> bool:
    """Whether g depends on what is quantized."""
    return format == "nvfp4" and rule != "paper"


def global_scale(
    format: str,
    rule: str,
    group_max: Tensor | None,
    rms: Tensor | None,
    device: torch.device,
    method: str | None = None,
) -> Tensor | None:
    """g of one side, fp32 [1], or None where the format has none.

    group_max [..]: the largest magnitude of each group of the tensor. rms: the tensor's root mean square. Where
    `calibrates_global_scale` is true, one of them must be given: rms, or group_max for the first two methods. Every
    method gives a power of two, so that g itself rounds nothing:

        median  as amax, but the scale of the median group is at most MEDIAN_SCALE. A token a thousand times the others
                costs them nothing. If calibration has no such token, one that comes later still does not saturate.
        amax    the largest g with HEADROOM · amax · g/6 ≤ 448
        rms     2^round(log2(16 / rms)); the other methods use it if there is no group_max
    """
    if not calibrates_global_scale(format, rule):
        constant = PAPER_GLOBAL_SCALE.get(format) if rule == "paper" else None
        return None if constant is None else torch.tensor([constant], dtype=torch.float32, device=device)
    groups = None if group_max is None else group_max[group_max > 0]
    method = method or GLOBAL_SCALE_METHOD
    if groups is not None and groups.numel():
        wanted = formats.E4M3_MAX * formats.E2M1_MAX / (HEADROOM * float(groups.amax()))
        if method == "median":
            wanted = min(wanted, MEDIAN_SCALE * formats.E2M1_MAX / float(groups.median()))
        exponent = math.floor(math.log2(wanted))
    if groups is None or not groups.numel() or method == "rms":
        exponent = round(math.log2(16.0 / float(rms))) if rms is not None and float(rms) > 0 else 0
    # The bounds keep g · amax finite: amax is at most the largest fp32 number, about 2^128.
    return torch.tensor([2.0 ** max(-126, min(126, exponent))], dtype=torch.float32, device=device)
