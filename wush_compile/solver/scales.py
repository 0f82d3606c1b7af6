"""Global scales (SPEC §4): one fp32 factor a tensor, fixed before anything is rounded."""

import math

import torch
from torch import Tensor

from .. import formats

# The authors' constants; mxfp4's goes with their scale rule, which leaves a factor of 3 in.
PAPER_GLOBAL_SCALE = {"mxfp4": 3.0, "nvfp4": 10.0}
# The largest group maximum known may grow by this much before its scale saturates: unseen tokens, GPTQ's updates.
HEADROOM = 2.0


def global_scale(
    format: str, rule: str, amax: Tensor | None, rms: Tensor | None, device: torch.device, method: str = "amax"
) -> Tensor | None:
    """g of one side, fp32 [1], or None where the format has none.

    amax: largest absolute value known of what is to be quantized; rms: its root mean square (one may be None).
    Methods for nvfp4, all powers of two so that g rounds nothing:
        amax  the largest g with HEADROOM · amax · g/6 ≤ 448
        rms   2^round(log2(16 / rms))
    """
    if rule == "paper":
        g = PAPER_GLOBAL_SCALE.get(format)
    elif format != "nvfp4":
        g = None
    elif float(rms if amax is None else amax) == 0:
        g = 1.0
    elif method == "amax" and amax is not None:
        g = 2.0 ** math.floor(math.log2(formats.E4M3_MAX * formats.E2M1_MAX / (HEADROOM * float(amax))))
    else:
        g = 2.0 ** round(math.log2(16.0 / float(rms)))
    return None if g is None else torch.tensor([g], dtype=torch.float32, device=device)
