"""The ops: fake kernels, and the reference that defines each op and its schema on every device (docs/spec.md §6).

    wush::observe             adds rows to a second moment and to a sample (calibration)
    wush::transform_quantize  x -> blockwise x Tᵀ -> codes and scales, in one op
    wush::fp4_linear          quantized x times quantized weight, fp32 accumulation, one rounding

Codes and scales cross op boundaries as uint8 (int4 scales: bf16); the format string gives them meaning, and
`scale_layout` says how an activation's scales lie in memory (layouts.py). Leading dimensions are free: each position in
them is a row. There may be no rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import formats
from ..errors import one_of
from ..feedback import FORMATS as FEEDBACK_FORMATS
from ..feedback import quantize
from ..feedback import shape as feedback_shape
from ..formats import WEIGHT_FORMATS, channels, get_format
from ..phases import phase
from .layouts import from_lanes, in_rows, lay_out, layouts_of, operand_of, scale_shape, to_lanes
from .schema import check, define

# A CPU quantizes this many values at a time. It is 4x faster when the temporaries stay in its cache.
CHUNK_ELEMENTS = 2**16
# A CPU decodes this many weights of 8 bits at a time, so that their temporaries stay in its cache: a head is large.
DECODED_ELEMENTS = 2**18
# One in this many rows of a group's sample is kept for the rows of largest norm. The others are a uniform sample.
LARGEST_SHARE = 8
# Largest relative error (Frobenius norm) of a provider's product. Rounding to bf16 costs at most 2^-9 = 1.95e-3, and
# 1.7e-3 on random numbers; Hopper's fp8 accumulators add up to 4e-4.
PRODUCT_ERROR = {torch.bfloat16: 2.2e-3, torch.float32: 5e-4}


# -- observe ---------------------------------------------------------------------------------------------------------


def _uniform(index: Tensor, seed: int) -> Tensor:
    """Row numbers (int64) -> pseudo-random float64 in [0, 1): a 31-bit integer hash, equal on every device."""
    h = (index + 1) * 747796405 + (seed % 65521) * 2891336453
    for factor in (277803737, 1103515245):
        h = h & 0x7FFFFFFF
        h = (h ^ (h >> 15)) * factor
    h = h & 0x7FFFFFFF
    return (h ^ (h >> 16)).to(torch.float64) / 2**31


def _sample_uniform(rows: Tensor, reservoir: Tensor, seen: Tensor, seed: int) -> None:
    """Reservoir sampling of rows [n, K]; seen int64 [] counts the rows before them.

    Row i draws a random slot below i + 1, and enters the reservoir if the reservoir has that slot.
    """
    capacity = reservoir.shape[0]
    position = torch.arange(rows.shape[0], device=rows.device)
    index = position + seen
    slot = torch.where(index < capacity, index, (_uniform(index, seed) * (index + 1)).floor().to(torch.int64))
    # The last row that draws a slot keeps it, as if the rows came one after the other. Slot `capacity` takes the rows
    # that do not enter. No size here depends on the data, so the host need not wait for a GPU.
    last = torch.full((capacity + 1,), -1, dtype=torch.int64, device=rows.device)
    last.scatter_reduce_(0, slot.clamp(max=capacity), position, "amax")
    last = last[:capacity]
    chosen = rows[last.clamp(min=0)].to(reservoir.dtype)
    reservoir.copy_(torch.where((last >= 0)[:, None], chosen, reservoir))


def _sample_largest(rows: Tensor, largest: Tensor) -> None:
    """Keeps the rows of largest norm among `largest` [m, K] (zero rows are empty slots) and `rows` [n, K]."""
    kept = largest.shape[0]
    norm = torch.cat([torch.linalg.vector_norm(r, dim=-1, dtype=torch.float32) for r in (largest, rows)])
    index = norm.topk(kept).indices
    new = rows[(index - kept).clamp(min=0)].to(largest.dtype)
    largest.copy_(torch.where((index < kept)[:, None], largest[index.clamp(max=kept - 1)], new))


def scaled_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows [n, K] times the square roots of their weights [n], fp32: their moment is Σ w xxᵀ."""
    return rows.to(torch.float32) * weight.to(torch.float32).sqrt()[:, None]


def _add_moment(rows: Tensor, moment: Tensor, weight: Tensor | None = None) -> None:
    """moment += rowsᵀ·diag(weight)·rows in fp32: rows [n, K], weight [n], moment [K, K] or its blocks [K/B, B, B]."""
    wide = rows.to(torch.float32) if weight is None else scaled_rows(rows, weight)
    if moment.dim() == 2:
        moment.addmm_(wide.T, wide)  # [K, K]
    else:
        blocks = wide.unflatten(-1, (moment.shape[0], -1)).transpose(0, 1)  # [K/B, n, B]
        moment.baddbmm_(blocks.transpose(1, 2), blocks)  # [K/B, B, B]


def observe_with(
    add_moment: Callable[[Tensor, Tensor, Tensor | None], None],
    x: Tensor,
    mask: Tensor | None,
    moment: Tensor,
    count: Tensor,
    sample: Tensor,
    seed: int = 0,
    weight: Tensor | None = None,
) -> None:
    """`wush::observe`, with `add_moment(rows [n, K], moment, weight [n] or None)` to compute the second moments."""
    rows = x.reshape(-1, x.shape[-1])  # [n, K]
    weight = None if weight is None else weight.reshape(-1)
    if mask is not None:
        kept = mask.reshape(-1) != 0
        rows, weight = rows[kept], None if weight is None else weight[kept]
    if rows.shape[0] == 0:
        return
    with phase("moments"):
        add_moment(rows, moment, weight)
    if sample.shape[0]:
        largest = sample.shape[0] // LARGEST_SHARE
        uniform = sample.shape[0] - largest
        with phase("samples"):
            _sample_uniform(rows, sample[:uniform], count, seed)
            if largest:
                _sample_largest(rows, sample[uniform:])
    count.add_(rows.shape[0])


def _observe(
    x: Tensor,
    mask: Tensor | None,
    moment: Tensor,
    count: Tensor,
    sample: Tensor,
    seed: int = 0,
    weight: Tensor | None = None,
) -> None:
    observe_with(_add_moment, x, mask, moment, count, sample, seed, weight)


def _observe_fake(x, mask, moment, count, sample, seed=0, weight=None):
    for other in (mask, moment, count, sample, weight):
        if other is not None:
            torch._check(other.device == x.device, lambda: f"x is on {x.device}, its mask or state on {other.device}")
    if weight is not None:
        torch._check(
            weight.numel() * x.shape[-1] == x.numel(),
            lambda: f"weight has {weight.numel()} values, x {x.numel() // x.shape[-1]} rows",
        )
    k, covered = x.shape[-1], moment.shape[-1] if moment.dim() == 2 else moment.shape[0] * moment.shape[-1]
    torch._check(covered == k, lambda: f"the moment covers {covered} channels, x has {k}")


# -- transform_quantize ----------------------------------------------------------------------------------------------


def _check_format(format: str, scale_rule: str) -> formats.Format:
    known = formats.FORMATS | formats.ACTIVATION_FORMATS
    fmt = known[one_of("format of activations", format, known)]
    if scale_rule not in fmt.scale_rules:
        raise ValueError(f"scale rule {scale_rule!r} is not one of {format}'s: {', '.join(fmt.scale_rules)}")
    return fmt


def block_transform(x: Tensor, transform: Tensor | None) -> Tensor:
    """x [.., K] -> fp32 [.., K], block b times T_bᵀ; transform [K/B, B, B], [1, B, B] (one for all) or None."""
    x = x.to(torch.float32)
    if transform is None:
        return x
    size = transform.shape[-1]
    t = transform.to(torch.float32)
    if transform.shape[0] == 1:
        return (x.unflatten(-1, (-1, size)).flatten(0, -2) @ t[0].T).view(x.shape)
    # `unflatten` refuses a transform made for another width; `reshape` alone would not.
    blocks = x.unflatten(-1, (transform.shape[0], size)).reshape(-1, transform.shape[0], size)  # [M, K/B, B]
    return torch.bmm(blocks.transpose(0, 1), t.transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def _transform_quantize_at_once(
    x: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = block_transform(x, transform)  # fp32 [.., K]
    if format == "none":
        # Not `to` alone: an op must not return its argument.
        codes, scales = y.to(x.dtype, copy=True), y.new_empty((*y.shape[:-1], 0))
        return to_lanes(codes, format) if scale_layout == "lanes" else codes, scales
    if format == "fp8":
        codes, scales = formats.quantize_fp8(y)
        return to_lanes(codes, format) if scale_layout == "lanes" else codes, scales
    codes, scales = quantize(y, format, scale_rule, global_scale, feedback)
    if scale_layout == "lanes":
        values = formats.dequantize(codes, scales, format).to(torch.bfloat16)
        return to_lanes(values, "none"), y.new_empty((*y.shape[:-1], 0))
    return codes, lay_out(scales, scale_layout)


def _transform_quantize(
    x: Tensor,
    transform: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    scale_rule: str,
    scale_layout: str = "rows",
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_format(format, scale_rule)
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    columns, dtype, groups, scale_dtype = operand_of(format, k, x.dtype, scale_layout)
    codes = x.new_empty((rows.shape[0], columns), dtype=dtype)
    scales = x.new_empty((rows.shape[0], groups), dtype=scale_dtype)
    step = max(1, CHUNK_ELEMENTS // max(k, 1)) if x.device.type == "cpu" else max(1, rows.shape[0])
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        codes[chunk], scales[chunk] = _transform_quantize_at_once(
            rows[chunk],
            transform,
            global_scale,
            format,
            scale_rule,
            "lanes" if scale_layout == "lanes" else "rows",
            feedback,
        )
    scales = scales.view(scale_shape(x.shape[:-1], groups, "rows"))
    return codes.view(*x.shape[:-1], columns), lay_out(scales, scale_layout)


def _check_feedback(feedback: Tensor, width: int, format: str, scale_rule: str) -> None:
    if format not in FEEDBACK_FORMATS or scale_rule == "paper":
        raise ValueError(f"{format} with the scale rule {scale_rule} is rounded to nearest: it takes no feedback")
    torch._check(feedback.dtype == torch.bfloat16, lambda: f"feedback is {feedback.dtype}, not bfloat16")
    wanted = feedback_shape(format, width)
    for a, b in zip((feedback.dim(), *feedback.shape), (3, *wanted)):
        torch._check(a == b, lambda: f"feedback has the shape {tuple(feedback.shape)}, not {wanted}")


def _transform_quantize_fake(x, transform, global_scale, format, scale_rule, scale_layout="rows", feedback=None):
    fmt = _check_format(format, scale_rule)
    k = x.shape[-1]
    torch._check(
        k % fmt.group_size == 0, lambda: f"width {k} is not a multiple of {format}'s group of {fmt.group_size}"
    )
    for other in (transform, global_scale, feedback):
        if other is not None:
            torch._check(
                other.device == x.device,
                lambda: f"x is on {x.device}, its transform, scale or feedback on {other.device}",
            )
    if feedback is not None:
        _check_feedback(feedback, k, format, scale_rule)
    if transform is not None:
        blocks, size = transform.shape[0], transform.shape[-1]
        torch._check(k % size == 0, lambda: f"width {k} is not a multiple of the transform's {size}")
        torch._check(blocks == 1 or blocks * size == k, lambda: f"{blocks} blocks of {size} do not cover width {k}")
    lead = x.shape[:-1]
    columns, dtype, groups, scale_dtype = operand_of(format, k, x.dtype, scale_layout)
    shape = scale_shape(lead, groups, scale_layout)
    torch._check(
        scale_layout in layouts_of(format, k),
        lambda: f"{format} of width {k} has the layouts {', '.join(layouts_of(format, k))}, not {scale_layout}",
    )
    return x.new_empty((*lead, columns), dtype=dtype), x.new_empty(shape, dtype=scale_dtype)


# -- fp4_linear ------------------------------------------------------------------------------------------------------


def _operand(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """Codes [.., K/2], int8: [.., K] -> fp32 [.., K] without the global scale; eager mode reads a table."""
    byte = torch.arange(256, device=codes.device, dtype=torch.uint8)
    group = get_format(format).group_size
    if format in ("int4", "int8"):
        return formats.dequantize(codes, scales, format)
    table = formats.e2m1_decode(formats.unpack(byte[:, None]))  # [256, 2]
    values = torch.nn.functional.embedding(codes.to(torch.int32), table)  # [.., K/2, 2]
    groups = values.flatten(-2).unflatten(-1, (-1, group))
    return groups.mul_(formats.decode_scales(scales, format)[..., None]).flatten(-2)


def _product_at_once(x: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    return torch.nn.functional.linear(x, formats.dequantize(codes, scales, format))


def _product(x: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """x [.., K] times a weight, transposed: [.., N]."""
    step = max(1, DECODED_ELEMENTS // codes.shape[-1]) if format == "int8" and x.device.type == "cpu" else len(codes)
    if step >= len(codes):
        return torch.nn.functional.linear(x, _operand(codes, scales, format))
    pairs = zip(codes.split(step), scales.split(step), strict=True)
    return torch.cat([torch.nn.functional.linear(x, _operand(c, s, format)) for c, s in pairs], -1)


def _check_by_row(weight_codes: Tensor, weight_global_scale: Tensor | None, bias: Tensor | None) -> None:
    """Raises a RuntimeError with the shapes unless what the weight has for each of its N rows fits."""
    rows = weight_codes.shape[0]
    if weight_global_scale is not None:
        of_rows = weight_global_scale.dtype == torch.bfloat16
        torch._check(
            weight_global_scale.shape == ((rows,) if of_rows else (1,)),
            lambda: (
                f"weight_global_scale is {weight_global_scale.dtype} {tuple(weight_global_scale.shape)}; of a weight "
                f"with {rows} rows it is torch.float32 (1,), or torch.bfloat16 ({rows},), a factor of each row"
            ),
        )
    if bias is not None:
        torch._check(bias.shape == (rows,), lambda: f"the bias is {tuple(bias.shape)}, the weight has {rows} rows")


def _fp4_linear_by(
    decode: Callable[[Tensor, Tensor, str], Tensor], product: Callable[[Tensor, Tensor, Tensor, str], Tensor]
) -> Callable[..., Tensor]:
    """`wush::fp4_linear`: the activation is made fp32 by `decode(codes, scales, format)`, then `product` follows."""

    def fp4_linear(
        codes: Tensor,
        scales: Tensor,
        global_scale: Tensor | None,
        weight_codes: Tensor,
        weight_scales: Tensor,
        weight_global_scale: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        format: str,
        out_dtype: torch.dtype,
        scale_layout: str = "rows",
        activation_format: str = "same",
    ) -> Tensor:
        _check_by_row(weight_codes, weight_global_scale, bias)  # a call on real tensors does not pass the fake kernel
        if scale_layout == "lanes":
            codes = from_lanes(codes, "fp8" if codes.dtype == torch.uint8 else "none")
        if scale_layout == "lanes" and activation_format == "same":
            x = (
                codes.view(torch.float8_e5m2).to(torch.float32) * scales
                if format == "mxfp4"
                else codes.to(torch.float32)
            )
        elif activation_format == "none":
            x = codes.to(torch.float32)  # [.., K]
        elif activation_format == "fp8":
            x = formats.dequantize_fp8(codes, scales)
        else:
            groups = 2 * codes.shape[-1] // get_format(format).group_size
            x = decode(codes, in_rows(scales, codes.shape[:-1], groups, scale_layout), format)
        y = product(x, weight_codes, weight_scales, format)  # [.., N]
        factors = [g.to(torch.float32) for g in (global_scale, weight_global_scale) if g is not None]
        if factors:
            y = y * (1.0 / (factors[0] if len(factors) == 1 else factors[0] * factors[1]))
        if bias is not None:
            y = y + bias.to(torch.float32)
        y = y.to(out_dtype)
        return y if residual is None else y + residual.to(out_dtype)

    return fp4_linear


_fp4_linear = _fp4_linear_by(_operand, _product)


def _fp4_linear_fake(
    codes,
    scales,
    global_scale,
    weight_codes,
    weight_scales,
    weight_global_scale,
    bias,
    residual,
    format,
    out_dtype,
    scale_layout="rows",
    activation_format="same",
):
    fmt = get_format(format)
    if activation_format not in ("same", *formats.ACTIVATION_FORMATS):
        raise ValueError(
            f"activation format {activation_format!r} is not same, {', '.join(formats.ACTIVATION_FORMATS)}"
        )
    if format in WEIGHT_FORMATS and activation_format == "same":
        raise ValueError(f"{format} is a format of weights alone: the activation is fp8 or none")
    if scale_layout != "rows":
        activation = format if activation_format == "same" else activation_format
        packed = scale_layout == "swizzled"
        groups = 2 * codes.shape[-1] // fmt.group_size if packed else operand_of(activation, 0, codes.dtype, "lanes")[2]
        shape = scale_shape(codes.shape[:-1], groups, scale_layout)
        torch._check(
            scale_layout in layouts_of(activation, codes.shape[-1]),
            lambda: f"{activation} of width {codes.shape[-1]} has no layout {scale_layout}",
        )
        torch._check(
            scales.dim() == len(shape),
            lambda: f"scales have {scales.dim()} dimensions, {scale_layout} has {len(shape)}",
        )
        for have, want in zip(scales.shape, shape):
            torch._check(have == want, lambda: f"{scale_layout} scales are {tuple(scales.shape)}, not {shape}")
    packed = activation_format == "same" and scale_layout != "lanes"
    width, wanted = codes.shape[-1] * (2 if packed else 1), channels(weight_codes, format)
    torch._check(width == wanted, lambda: f"activation has {width} channels, weight {wanted}")
    _check_by_row(weight_codes, weight_global_scale, bias)
    for other in (scales, global_scale, weight_codes, weight_scales, weight_global_scale, bias, residual):
        if other is not None:
            torch._check(
                other.device == codes.device, lambda: f"activation is on {codes.device}, an operand on {other.device}"
            )
    return codes.new_empty((*codes.shape[:-1], weight_codes.shape[0]), dtype=out_dtype)


REFERENCE = {"observe": _observe, "transform_quantize": _transform_quantize, "fp4_linear": _fp4_linear}
FAKE = {"observe": _observe_fake, "transform_quantize": _transform_quantize_fake, "fp4_linear": _fp4_linear_fake}
# The same numbers without a table and without chunks: a graph can hold neither constants nor loops.
ARITHMETIC = {
    "transform_quantize": _transform_quantize_at_once,
    "fp4_linear": _fp4_linear_by(formats.dequantize, _product_at_once),
}
for name, reference in REFERENCE.items():
    define(name, reference, FAKE[name], mutates=("moment", "count", "sample") if name == "observe" else ())
for name, function in ARITHMETIC.items():
    check(name, "the arithmetic", function)
