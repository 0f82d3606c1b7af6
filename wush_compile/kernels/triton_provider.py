"""The Triton provider's ops and what they refuse: pure functions of the arguments."""

import torch

from . import Implementation, triton_gram, triton_linear, triton_quantize

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def refuses_transform_quantize(x, transform, global_scale, format, scale_rule) -> str | None:
    if format not in ("mxfp4", "nvfp4"):
        return f"{format} has no Triton kernel"
    if x.dtype not in FLOATS:
        return f"input is {x.dtype}"
    if transform is not None:
        block = transform.shape[-1]
        if transform.dtype not in FLOATS:
            return f"transform is {transform.dtype}"
        if block & (block - 1) or block > 256 or block < 16:
            return f"transform blocks of {block}"
        if (block > 64 and torch.float32 in (x.dtype, transform.dtype)) or x.shape[-1] % block:
            return "fp32 transforms of wide blocks"
    return None


def refuses_fp4_linear(
    codes, scales, global_scale, weight_codes, weight_scales, weight_global_scale, bias, residual, format, out_dtype
) -> str | None:
    return triton_linear.supports(format, 2 * weight_codes.shape[-1])


def refuses_observe(x, mask, moment, count, sample, seed=0) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16) or moment.dtype != torch.float32:
        return f"rows are {x.dtype}, the moment {moment.dtype}"
    return None


IMPLEMENTATIONS = {
    "observe": Implementation(triton_gram.observe, refuses_observe),
    "transform_quantize": Implementation(triton_quantize.transform_quantize, refuses_transform_quantize),
    "fp4_linear": Implementation(triton_linear.fp4_linear, refuses_fp4_linear),
}
