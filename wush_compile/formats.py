"""MXFP4, NVFP4, INT4 and INT8: groups, scale rules, encode, decode, pack (docs/spec.md §4).

This file is the numeric oracle: every kernel agrees with it bit for bit on codes and scales. All arithmetic is fp32 in
the order written here, without fused multiply-add. It uses no tensor constants, so that a compiler can inline it.

A tensor [.., K] is quantized in groups of G channels of its last dimension:

    codes   uint8 [.., K/2]  two 4-bit codes a byte, the even channel in the low nibble; int8: [.., K], one a byte
    scales  uint8 [.., K/G]  e8m0 (mxfp4) or e4m3 (nvfp4) bytes; bf16 [.., K/G] for int4 and int8

`g` is the global scale, fp32 [1], or None for 1. Values are multiplied by g before they are encoded.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import one_of


class Format(NamedTuple):
    """The facts of a format that the rest of the library needs."""

    name: str
    group_size: int
    scale_dtype: torch.dtype
    scale_rules: tuple[str, ...]
    per_byte: int = 2  # codes in a byte


FORMATS = {
    "mxfp4": Format("mxfp4", 32, torch.uint8, ("absmax", "mse", "ocp", "paper")),
    "nvfp4": Format("nvfp4", 16, torch.uint8, ("absmax", "mse", "search", "paper")),
    "int4": Format("int4", 32, torch.bfloat16, ("absmax", "mse", "gaussian", "paper")),
}
# Formats of weights alone: beside 8 bits an activation has 16 bits, or fp8's 8.
WEIGHT_FORMATS = {"int8": Format("int8", 32, torch.bfloat16, ("absmax",), 1)}
# Formats of activations alone, beside the weights' own ("same"): what a quantizer writes, and a product reads.
#     fp8    e4m3 bytes, one fp32 scale a row (token): amax / 448
#     none   the model's dtype, no scales
ACTIVATION_FORMATS = {
    "fp8": Format("fp8", 1, torch.float32, ("token",)),
    "none": Format("none", 1, torch.float32, ("none",)),
}
E2M1_MAX = 6.0
E4M3_MAX = 448.0
INT8_MAX = 127.0
# 2/15 of this is the step of the uniform 16-level quantizer with the least squared error on a unit normal
# distribution (docs/spec.md §4).
GAUSSIAN_CLIP = 2.513930578568423
MX_NAN, NV_NAN = 0xFF, 0x7F


def operand_layout(format: str, width: int, dtype: torch.dtype) -> tuple[int, torch.dtype, int, torch.dtype]:
    """What a quantizer of this format writes for a row of `width` channels of a model in `dtype`.

    (columns of codes, their dtype, number of scales, their dtype).
    """
    if format == "fp8":
        return width, torch.uint8, 1, torch.float32
    if format == "none":
        return width, dtype, 0, torch.float32
    fmt = FORMATS[format]
    return width // 2, torch.uint8, width // fmt.group_size, fmt.scale_dtype


def get_format(name: str) -> Format:
    """The `Format` of weights with this name. Raises `ConfigError` with the nearest match for an unknown name."""
    known = FORMATS | WEIGHT_FORMATS
    return known[one_of("format", name, known)]


def channels(codes: Tensor, format: str) -> int:
    """The number of channels K of packed codes [.., K/2], int8: [.., K]."""
    return codes.shape[-1] * get_format(format).per_byte


# -- e2m1 ------------------------------------------------------------------------------------------------------------


def _e2m1_steps(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes fp32 -> numbers of steps: of 1/2 below 2, of 1 from 2 to 4, of 2 from 4 to 6. Their sum is the code.

    Ties go to the even code: torch.round is half-to-even, each of the three ranges begins at an even code, and the
    differences are exact. The code avoids `where`, which on a CPU costs a hundred times as much as any op here.
    """
    return (
        (m.clamp(max=2) * 2).round(),
        (m - 2).clamp(0, 2).round(),
        ((m - 4).clamp(0, 2) * 0.5).round(),
    )


def _e2m1_magnitude(m: Tensor) -> Tensor:
    halves, ones, twos = _e2m1_steps(m)
    return halves * 0.5 + ones + twos * 2


def e2m1_encode(x: Tensor) -> Tensor:
    """fp32 -> codes `s e e m` (uint8): nearest, ties to the even code, saturating at 6. −0 keeps its sign."""
    halves, ones, twos = _e2m1_steps(x.abs())
    sign = (x.view(torch.int32) >> 28) & 8
    return ((halves + ones + twos).to(torch.int32) | sign).to(torch.uint8)


def e2m1_round(x: Tensor) -> Tensor:
    """fp32 -> the nearest e2m1 value as fp32. Equals `e2m1_decode(e2m1_encode(x))`."""
    return torch.copysign(_e2m1_magnitude(x.abs()), x)


def e2m1_decode(codes: Tensor) -> Tensor:
    """Codes (uint8, 0..15) -> fp32 values."""
    bits = codes.to(torch.int32)
    c = bits & 7
    # 2·value of code c: 0, 1, 2, 3, 4, 6, 8, 12.
    double = c + (c - 4).clamp(min=0) + (c - 6).clamp(min=0) * 2
    return double.to(torch.float32) * (0.5 - (bits >> 3).to(torch.float32))


# -- scale bytes -----------------------------------------------------------------------------------------------------


def _float_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _exp2(n: Tensor) -> Tensor:
    """Exact 2**n as fp32, for int32 n in [−127, 127]. 2^−127 is subnormal."""
    return _float_from_bits(torch.where(n > -127, (n + 127) << 23, 0x400000))


def e8m0_decode(scales: Tensor) -> Tensor:
    """e8m0 bytes -> fp32 2^(byte − 127); 255 -> NaN."""
    byte = scales.to(torch.int32)
    return torch.where(byte == MX_NAN, float("nan"), _exp2(byte.clamp(max=254) - 127))


def e4m3_encode(x: Tensor) -> Tensor:
    """fp32 in [0, 448] -> e4m3 bytes, round to nearest even."""
    exponent = ((x.view(torch.int32) >> 23) - 127).clamp(min=-6)
    # In units of 2^(exponent − 3) a normal value is 8 to 16, a subnormal one 0 to 8. 16 carries into the next exponent.
    mantissa = (x * _exp2(3 - exponent)).round().to(torch.int32)
    return (mantissa + ((exponent + 6) << 3)).to(torch.uint8)


def e4m3_decode(scales: Tensor) -> Tensor:
    """e4m3 bytes -> fp32; 0x7F -> NaN. Scales carry no sign."""
    byte = scales.to(torch.int32)
    exponent = (byte >> 3).clamp(min=1)
    mantissa = (byte & 7) + torch.where(byte >= 8, 8, 0)
    value = mantissa.to(torch.float32) * _exp2(exponent - 10)
    return torch.where(byte == NV_NAN, float("nan"), value)


def decode_scales(scales: Tensor, format: str) -> Tensor:
    """Stored scales -> fp32 factors, without the global scale. The NaN mark decodes to NaN."""
    if format in ("int4", "int8"):
        return scales.to(torch.float32)
    return e8m0_decode(scales) if format == "mxfp4" else e4m3_decode(scales)


# -- scale rules -----------------------------------------------------------------------------------------------------


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two, neighbours first: 2i and 2i + 1 at every step.

    The order is a part of the contract. A GPU thread holds consecutive channels; in this order it adds its own values
    before it needs those of another thread.
    """
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def squared_error(x: Tensor, inverse: Tensor, unit: Tensor) -> Tensor:
    """Σ((v − e2m1(v))·unit)² of v = x·inverse; x [.., G], inverse and unit [..] -> [..]."""
    v = (x * inverse[..., None]).abs()  # signs do not matter
    d = (v - _e2m1_magnitude(v)) * unit[..., None]
    return _tree_sum(d * d)


def _halved_scale_gain(x: Tensor, inverse: Tensor) -> Tensor:
    """Positive where halving the scale 1/inverse lowers a group's squared error. No value exceeds 6 in the given scale.

    Let v = |x|·inverse. The two grids differ below 1, where the steps of the halved scale are 1/4 instead of 1/2, and
    above 3, the largest value of the halved scale. Let r be the distance of v to the nearest multiple of 1/2. Halving
    lowers the squared error by

        below 1    r² − (distance to the nearest multiple of 1/4)² = max(r − 1/8, 0)/2    with r = ¼ − ||v − ½| − ¼|
        above 3    (distance to 3, 4 or 6)² − (v − 3)²             = −2·max(v − 3.5, 0)   up to v = 5, and less above

    so no squares are needed. The function sums twice these values, with v bounded by 4.5. The bound does not change the
    sign: a value at the bound loses 4, and 31 other values gain at most 1/8 each.
    """
    v = x.abs() * inverse[..., None]
    gain = (0.125 - ((v - 0.5).abs() - 0.25).abs()).clamp(min=0)
    return _tree_sum(gain - (v - 3.5).clamp(0, 1) * 4)


def _scales_mxfp4(x: Tensor, amax: Tensor, rule: str) -> Tensor:
    bits = amax.view(torch.int32)
    exponent = bits >> 23  # biased, 0..254 for finite amax
    if rule == "paper":
        return exponent.clamp(1, 254)
    if rule == "ocp":
        return (exponent - 2).clamp(1, 254)
    byte = exponent - 2 + ((bits & 0x7FFFFF) > 0x400000).to(torch.int32)
    best = byte.clamp(1, 254)
    if rule == "absmax":
        return best
    # The byte one above `best` cannot win: up to the group's maximum its values are a subset of those of `best`.
    lower = (best - 1).clamp(1, 254)
    return torch.where(_halved_scale_gain(x, _exp2(127 - best)) > 0, lower, best)  # the first candidate wins ties


def _scales_nvfp4(x: Tensor, amax: Tensor, rule: str, g: Tensor) -> Tensor:
    def byte_for(largest: float) -> Tensor:
        # On a GPU a division by a number multiplies by its reciprocal, which is another result.
        byte = e4m3_encode((amax * (g / torch.full_like(g, largest))).clamp(max=E4M3_MAX))
        return byte.to(torch.int32).clamp(0x01, 0x7E)

    best = byte_for(6.0)
    if rule == "search":
        return _search_nvfp4(x, best, g)
    if rule != "mse":
        return best
    narrow = byte_for(4.0)
    s0, s1 = e4m3_decode(best), e4m3_decode(narrow)
    return torch.where(squared_error(x, g / s1, s1) < squared_error(x, g / s0, s0), narrow, best)


# What `search` adds to the byte of `absmax`, in order. Of 12 offsets these four have the least error on normal groups,
# .90 of that of `mse`; all 12 have .87 (benchmarks/trial_scale_offsets.py).
SEARCH_OFFSETS = (0, -1, 4, 5)


def _search_nvfp4(x: Tensor, first: Tensor, g: Tensor) -> Tensor:
    def error(byte: Tensor) -> Tensor:
        s = e4m3_decode(byte)
        return squared_error(x, g / s, s)

    best, least = first, error(first)
    for offset in SEARCH_OFFSETS[1:]:
        byte = (first + offset).clamp(0x01, 0x7E)
        e = error(byte)
        less = e < least
        best, least = torch.where(less, byte, best), torch.where(less, e, least)
    return best


def _scales_int4(x: Tensor, amax: Tensor, rule: str) -> Tensor:
    absmax = (amax * 0.125).to(torch.bfloat16)
    if rule == "absmax":
        return absmax
    mean_square = _tree_sum(x * x) * (1.0 / x.shape[-1])
    gaussian = (mean_square.sqrt() * (2 * GAUSSIAN_CLIP / 15)).to(torch.bfloat16)
    if rule in ("gaussian", "paper"):
        return gaussian

    def error(scales: Tensor) -> Tensor:
        d = x - decode(encode(x, scales, "int4", None), scales, "int4", None)
        return _tree_sum(d * d)

    return torch.where(error(gaussian) < error(absmax), gaussian, absmax)


def _global(g: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=like.device) if g is None else g.reshape(())


def compute_scales(x: Tensor, format: str, rule: str, g: Tensor | None = None) -> Tensor:
    """Scales of groups: fp32 [.., G] -> [..] in the format's scale dtype. A group with NaN or Inf gets the NaN mark.

    docs/spec.md §4 has the rules. `paper` expects the authors' constants: g = 3 for mxfp4, g = 10 for nvfp4. `mse` of
    int4 chooses between `absmax` (amax/8) and `gaussian`.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(-1)
    bad = ~torch.isfinite(amax)
    amax = torch.where(bad, 0.0, amax)
    if format in ("int4", "int8"):
        scales = _scales_int4(x, amax, rule) if format == "int4" else (amax * (1.0 / INT8_MAX)).to(torch.bfloat16)
        return torch.where(bad, float("nan"), scales.to(torch.float32)).to(torch.bfloat16)
    if format == "mxfp4":
        return torch.where(bad, MX_NAN, _scales_mxfp4(x, amax, rule)).to(torch.uint8)
    return torch.where(bad, NV_NAN, _scales_nvfp4(x, amax, rule, _global(g, x))).to(torch.uint8)


# The values that the largest magnitude of a group may be scaled to, for `scale_candidates`. 6 is e2m1's largest value.
# A scale too small for the largest value clips it.
NVFP4_LARGEST = (6.0, 7.2, 6.6, 5.5, 5.0, 4.5, 4.0, 3.75, 3.5, 3.25)
MXFP4_OFFSETS = (0, -1, 1, -2)
INT4_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@functools.cache
def _candidates(format: str, device: torch.device) -> Tensor:
    values = {"mxfp4": MXFP4_OFFSETS, "nvfp4": NVFP4_LARGEST, "int4": INT4_SHARES}[format]
    return torch.tensor(values, dtype=torch.float32, device=device)


def scale_candidates(x: Tensor, format: str, g: Tensor | None = None) -> Tensor:
    """Scales among which to choose: fp32 groups [.., G] -> [C, ..] in the format's scale dtype, `absmax` first.

    A group with NaN or Inf gets the NaN mark in all. nvfp4 takes a g of each group too [..].
    """
    each = _candidates(format, x.device).view(-1, *[1] * (x.dim() - 1))  # [C, 1..]
    if format == "nvfp4":
        amax = x.to(torch.float32).abs().amax(-1)
        bad = ~torch.isfinite(amax)
        g = g if g is not None and g.numel() > 1 else _global(g, x)
        byte = e4m3_encode((torch.where(bad, 0.0, amax) * (g / each)).clamp(max=E4M3_MAX))
        return torch.where(bad, NV_NAN, byte.clamp(0x01, 0x7E))
    first = compute_scales(x, format, "absmax", g)
    if format == "int4":
        return (first.to(torch.float32) * each).to(torch.bfloat16)
    byte = first.to(torch.int32)
    return torch.where(byte == MX_NAN, MX_NAN, (byte + each.to(torch.int32)).clamp(1, 254)).to(torch.uint8)


# -- encode, decode --------------------------------------------------------------------------------------------------


def encode(x: Tensor, scales: Tensor, format: str, g: Tensor | None = None) -> Tensor:
    """fp32 [.., n], with a scale [..] for each n values -> codes uint8 [.., n], one a byte; 0 in a NaN group."""
    x = x.to(torch.float32)
    if format == "int4":
        s = scales.to(torch.float32)[..., None]
        q = torch.nan_to_num((x / s).floor().clamp(-8, 7)) * (s > 0)
        return (q.to(torch.int32) & 15).to(torch.uint8)
    if format == "int8":
        s = scales.to(torch.float32)[..., None]
        q = torch.nan_to_num((x / s).round().clamp(-INT8_MAX, INT8_MAX)) * (s > 0)
        return q.to(torch.int8).view(torch.uint8)
    if format == "mxfp4":
        inverse = _exp2(127 - scales.to(torch.int32).clamp(1, 254))
        if g is not None:
            inverse = inverse * g.reshape(())
        nan_mark = MX_NAN
    else:
        inverse = _global(g, x) / e4m3_decode(scales.clamp(max=0x7E))
        nan_mark = NV_NAN
    return e2m1_encode(x * inverse[..., None]) * (scales != nan_mark).to(torch.uint8)[..., None]


def decode(codes: Tensor, scales: Tensor, format: str, g: Tensor | None = None) -> Tensor:
    """Codes [.., n], one a byte, with a scale [..] for each n codes -> fp32 [.., n].

    Without g the result is the operand of the matmul.
    """
    s = decode_scales(scales, format)[..., None]
    if format == "int4":
        c = codes.to(torch.int32)
        return ((c - ((c & 8) << 1)).to(torch.float32) + 0.5) * s
    if format == "int8":
        return codes.view(torch.int8).to(torch.float32) * s
    x = e2m1_decode(codes) * s
    return x if g is None else x / g.reshape(())


def pack(codes: Tensor) -> Tensor:
    """uint8 [.., K], one code a byte -> uint8 [.., K/2], the even channel in the low nibble."""
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [.., K/2] -> uint8 [.., K], one code a byte."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def quantize(x: Tensor, format: str, rule: str, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[.., K] -> (codes uint8 [.., K/2], int8: [.., K], scales [.., K/G]) (docs/spec.md §4)."""
    fmt = get_format(format)
    groups = x.to(torch.float32).unflatten(-1, (-1, fmt.group_size))  # [.., K/G, G]
    scales = compute_scales(groups, format, rule, g)  # [.., K/G]
    codes = encode(groups, scales, format, g).flatten(-2)
    return pack(codes) if fmt.per_byte == 2 else codes, scales


def dequantize(codes: Tensor, scales: Tensor, format: str, g: Tensor | None = None) -> Tensor:
    """(codes [.., K/2], int8: [.., K], scales [.., K/G]) -> fp32 [.., K]; with g, in the quantized tensor's units.

    g: [1], or [..], one for each row.
    """
    fmt = get_format(format)
    groups = (unpack(codes) if fmt.per_byte == 2 else codes).unflatten(-1, (-1, fmt.group_size))  # [.., K/G, G]
    if g is not None and g.numel() > 1:
        return decode(groups, scales, format).flatten(-2) / g.to(torch.float32)[..., None]
    return decode(groups, scales, format, g).flatten(-2)


# -- fp8 activations -------------------------------------------------------------------------------------------------

# Rows below this maximum are quantized as if it were their maximum, so that 448 / amax stays finite.
FP8_LEAST_MAX = 2.0**-100


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[.., K] -> (e4m3 bytes uint8 [.., K], fp32 scales [.., 1]): one scale a row, amax / 448 (docs/spec.md §4).

    A row with NaN or Inf gets the scale NaN and codes 0.
    """
    x = x.to(torch.float32)
    amax = x.abs().amax(-1, keepdim=True)  # [.., 1]
    finite = torch.isfinite(amax)
    amax = torch.where(finite, amax, 1.0).clamp(min=FP8_LEAST_MAX)
    y = torch.where(finite, x, 0.0) * (amax.reciprocal() * E4M3_MAX)
    sign = (y.view(torch.int32) >> 24) & 0x80
    codes = e4m3_encode(y.abs().clamp(max=E4M3_MAX)).to(torch.int32) | sign
    return codes.to(torch.uint8), torch.where(finite, amax * (1.0 / E4M3_MAX), float("nan"))


def dequantize_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """(e4m3 bytes [.., K], scales [.., 1]) -> fp32 [.., K]."""
    bits = codes.to(torch.int32)
    magnitude = e4m3_decode(bits & 0x7F)
    return torch.where(bits >= 0x80, -magnitude, magnitude) * scales
