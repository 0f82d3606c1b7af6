"""Global scales (SPEC §4): one fp32 factor a tensor, fixed before anything is rounded."""

import math

import torch
from torch import Tensor

from .. import formats

# The authors' constants; mxfp4's goes with their scale rule, which leaves a factor of 3 in.
PAPER_GLOBAL_SCALE = {"mxfp4": 3.0, "nvfp4": 10.0}
# The figures below are of benchmarks/trial_global_scale.py (benchmarks/results/trial_global_scale_cpu.json), by absmax.
# Its activations have one token in 500 that is 10 to 10^4 times the others, and three times that at test time.

# The largest value known may grow by this much before its scale saturates: unseen tokens, GPTQ's updates. Over the
# trial's threefold growth, in the mean of all cases, outlying tokens have 1.12 times the error of the best choice (with
# a headroom of 1: 3.4 times, of 4: 1.00), ordinary tokens 1.01 times (1: 1.00, 4: 1.04).
HEADROOM = 2.0
# The scale of the median group, if the largest leaves room: nearly ten octaves below saturation, five above e4m3's
# subnormals. Gaussian groups keep their relative error (.0091) from 2^-6 to 2^8. It is .010, .014, .015 at 2^-7, 2^-8,
# 2^-10, but .029, .19, .47 at 2^9, 2^10, 2^11: saturation is by far the worse end.
MEDIAN_SCALE = 0.5

# How a free g is chosen; `global_scale` explains. "median" and "amax" cost ordinary tokens the same. On outlying tokens
# "median" has 1.12 times the error of the best choice in the mean, "amax" 1.25 times, "rms" 10 times.
METHOD = "median"


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

    group_max [..]: absolute maxima of groups of what is to be quantized; rms: its root mean square. Where
    `calibrates_global_scale`, the rms or, for the first two methods, group_max must be given. All methods give a power
    of two, so that g itself rounds nothing:

        median  like amax, but with the scale of the median group no higher than MEDIAN_SCALE: a thousandfold token
                costs the others nothing, and without one a token far beyond calibration still does not saturate
        amax    the largest g with HEADROOM · amax · g/6 ≤ 448
        rms     2^round(log2(16 / rms)); also what the others do without group_max
    """
    if not calibrates_global_scale(format, rule):
        constant = PAPER_GLOBAL_SCALE.get(format) if rule == "paper" else None
        return None if constant is None else torch.tensor([constant], dtype=torch.float32, device=device)
    groups = None if group_max is None else group_max[group_max > 0]
    method = method or METHOD
    if groups is not None and groups.numel():
        wanted = formats.E4M3_MAX * formats.E2M1_MAX / (HEADROOM * float(groups.amax()))
        if method == "median":
            wanted = min(wanted, MEDIAN_SCALE * formats.E2M1_MAX / float(groups.median()))
        exponent = math.floor(math.log2(wanted))
    if groups is None or not groups.numel() or method == "rms":
        exponent = round(math.log2(16.0 / float(rms))) if rms is not None and float(rms) > 0 else 0
    # g · amax stays finite: amax is at most fp32's largest, about 2^128.
    return torch.tensor([2.0 ** max(-126, min(126, exponent))], dtype=torch.float32, device=device)
