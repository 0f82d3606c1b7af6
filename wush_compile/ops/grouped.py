"""`wush::fp4_grouped_linear`: rows sorted by expert, each times the weight of its own expert (mixtures of experts).

    rows offs[e-1] .. offs[e]    belong to expert e; offs[-1] counts as 0
    rows offs[E-1] .. S          belong to no expert: their results are zeros

With `index`, int32 or int64 [S], row s is row index[s] of the activation [T, K]: a token is quantized once and not
copied to its experts.

The reference is `fp4_linear` of each expert's rows. It reads the offsets back, so a CUDA graph cannot hold it; the
kernels find every row's expert on the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import formats
from ..errors import OffsetsError
from ..formats import get_format
from .core import FAKE, REFERENCE
from .layouts import in_rows
from .schema import check, define


def check_offsets(offs: Tensor, rows: int) -> list[int]:
    """The offsets as numbers; `OffsetsError` unless 0 <= offs[0] <= offs[1] <= .. <= rows. Waits for a GPU."""
    ends = offs.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends)):
        if not start <= end <= rows:
            raise OffsetsError(
                f"offs[{expert}] is {end}, after {start} and of {rows} rows: pass the running sums of the experts' row "
                "counts"
            )
    return ends


def by_expert(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op by an implementation of `wush::fp4_linear`: it computes each expert's rows, one expert after another."""

    def fp4_grouped_linear(
        codes: Tensor,
        scales: Tensor,
        global_scale: Tensor | None,
        weight_codes: Tensor,
        weight_scales: Tensor,
        weight_global_scale: Tensor | None,
        offs: Tensor,
        bias: Tensor | None,
        format: str,
        out_dtype: torch.dtype,
        scale_layout: str = "rows",
        activation_format: str = "same",
        index: Tensor | None = None,
    ) -> Tensor:
        # The fake kernel has the checks of shapes; a call on real tensors does not pass it.
        out = _fp4_grouped_linear_fake(
            codes,
            scales,
            global_scale,
            weight_codes,
            weight_scales,
            weight_global_scale,
            offs,
            bias,
            format,
            out_dtype,
            scale_layout,
            activation_format,
            index,
        ).zero_()  # [S, N]
        ends = check_offsets(offs, out.shape[0])
        if activation_format == "same":
            groups = 2 * codes.shape[-1] // get_format(format).group_size
            scales = in_rows(scales, codes.shape[:-1], groups, scale_layout)
        if index is not None:
            if index.numel() and not 0 <= index.min() <= index.max() < codes.shape[0]:
                raise OffsetsError(f"index names rows {index.min()} to {index.max()} of {codes.shape[0]} rows")
            codes, scales = codes[index], scales[index]
        for expert, (start, end) in enumerate(zip([0, *ends], ends)):
            if start < end:
                out[start:end] = linear(
                    codes[start:end],
                    scales[start:end],
                    global_scale,
                    weight_codes[expert],
                    weight_scales[expert],
                    None if weight_global_scale is None else weight_global_scale[expert : expert + 1],
                    None if bias is None else bias[expert],
                    None,
                    format,
                    out_dtype,
                    "rows",
                    activation_format,
                )
        return out

    return fp4_grouped_linear


def _fp4_grouped_linear_fake(
    codes,
    scales,
    global_scale,
    weight_codes,
    weight_scales,
    weight_global_scale,
    offs,
    bias,
    format,
    out_dtype,
    scale_layout="rows",
    activation_format="same",
    index=None,
):
    torch._check(codes.dim() == 2, lambda: f"rows of experts have 2 dimensions, codes have {codes.dim()}")
    torch._check(weight_codes.dim() == 3, lambda: f"experts' weights have 3 dimensions, not {weight_codes.dim()}")
    experts, n = weight_codes.shape[:2]
    torch._check(experts > 0, lambda: "there is no expert")
    torch._check(scale_layout != "lanes", lambda: "rows of experts have no layout lanes")
    torch._check(
        offs.dim() == 1 and offs.dtype == torch.int32, lambda: f"offs are {offs.dim()}-dimensional {offs.dtype}"
    )
    per_expert = dict(weight_scales=weight_scales, weight_global_scale=weight_global_scale, offs=offs, bias=bias)
    for name, t in per_expert.items():
        if t is not None:
            torch._check(t.shape[0] == experts, lambda: f"{name} is of {t.shape[0]} experts, the weight of {experts}")
            torch._check(t.device == codes.device, lambda: f"activation is on {codes.device}, {name} on {t.device}")
    if bias is not None:
        torch._check(bias.dim() == 2 and bias.shape[1] == n, lambda: f"bias is {tuple(bias.shape)}, not [E, {n}]")
    out = FAKE["fp4_linear"](
        codes,
        scales,
        global_scale,
        weight_codes[0],
        weight_scales[0],
        None,
        None,
        None,
        format,
        out_dtype,
        scale_layout,
        activation_format,
    )
    if index is None:
        return out
    torch._check(
        index.dim() == 1 and index.dtype in (torch.int32, torch.int64),
        lambda: f"index is {index.dim()}-dimensional {index.dtype}",
    )
    torch._check(index.device == codes.device, lambda: f"activation is on {codes.device}, index on {index.device}")
    return codes.new_empty((index.shape[0], n), dtype=out_dtype)


def _arithmetic(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    weight_codes: Tensor,
    weight_scales: Tensor,
    weight_global_scale: Tensor | None,
    offs: Tensor,
    bias: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
    scale_layout: str = "rows",
    activation_format: str = "same",
    index: Tensor | None = None,
) -> Tensor:
    """The op for a graph without Python, whose sizes do not depend on the offsets: every row times every weight, of
    which the products with the row's own expert are taken."""
    if activation_format == "same":
        groups = 2 * codes.shape[-1] // get_format(format).group_size
        x = formats.dequantize(codes, in_rows(scales, codes.shape[:-1], groups, scale_layout), format)  # [T, K]
    else:
        x = codes.to(torch.float32) if activation_format == "none" else formats.dequantize_fp8(codes, scales)
    x = x if index is None else x[index]  # [S, K]
    w = formats.dequantize(weight_codes, weight_scales, format)  # [E, N, K]
    row = torch.arange(x.shape[0], device=x.device)
    expert = (offs <= row[:, None]).sum(1)  # [S], E where there is none
    own = expert.clamp(max=w.shape[0] - 1)
    y = torch.matmul(x, w.transpose(1, 2))  # [E, S, N]
    y = y.gather(0, own[None, :, None].expand(1, *y.shape[1:]))[0]  # [S, N]
    factor = None if global_scale is None else global_scale  # [1]
    if weight_global_scale is not None:
        factor = weight_global_scale[own] if factor is None else factor * weight_global_scale[own]  # [S]
    if factor is not None:
        y = y * (1.0 / factor)[:, None]
    if bias is not None:
        y = y + bias.to(torch.float32)[own]
    return torch.where((expert < w.shape[0])[:, None], y, 0.0).to(out_dtype)


GROUPED_REFERENCE = {"fp4_grouped_linear": by_expert(REFERENCE["fp4_linear"])}
GROUPED_FAKE = {"fp4_grouped_linear": _fp4_grouped_linear_fake}
GROUPED_ARITHMETIC = {"fp4_grouped_linear": _arithmetic}
for name, reference in GROUPED_REFERENCE.items():
    define(name, reference, GROUPED_FAKE[name])
    check(name, "the arithmetic", GROUPED_ARITHMETIC[name])
