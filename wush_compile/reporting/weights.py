"""What a group's packed weights show: counts of codes and scales, power by channel, the spectrum of the transform."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import NV_NAN, decode_scales, dequantize, e2m1_decode
from ..modules import WushGroup

ROWS = 128  # rows that power by channel is measured on, evenly spaced
BLOCKS = 64  # transform blocks whose spectrum is measured, evenly spaced
POINTS = 48  # points of a curve


@dataclass(frozen=True)
class WeightFacts:
    """Aggregates of one group. No size grows with the weights.

    codes          (value, count), smallest value first
    scales         (k, count): scales in [2^k, 2^(k+1)), without the global scale
    before, after  power by channel over its mean, largest first, of the weights in the original basis and in the
                   transformed one; `POINTS` values at most
    spectrum       singular values of the transform's blocks over their median, largest first
    saturated      share of codes with the largest magnitude
    zero           share of codes that stand for zero
    bad_scales     share of scales that saturate, share of subnormal scales (nvfp4; None for the other formats)
    """

    codes: list[tuple[float, int]]
    scales: list[tuple[int, int]]
    before: list[float]
    after: list[float]
    spectrum: list[float]
    saturated: float
    zero: float
    bad_scales: tuple[float, float] | None


def weight_facts(group: WushGroup) -> WeightFacts:
    """Measures a group whose buffers have values."""
    codes = _codes(group)
    total = max(sum(count for _, count in codes), 1)
    ends = (codes[0][0], codes[-1][0])
    before, after = _power(group)
    scales, bad = _scales(group)
    return WeightFacts(
        codes,
        scales,
        before,
        after,
        _spectrum(group.input_transform),
        sum(count for value, count in codes if value in ends) / total,
        sum(count for value, count in codes if value == 0) / total,
        bad,
    )


def _counts(values: Tensor, size: int) -> list[int]:
    return torch.bincount(values.flatten(), minlength=size).tolist()


def _codes(group: WushGroup) -> list[tuple[float, int]]:
    if group.format == "int8":
        counts = _counts(group.weight_packed, 256)
        return [(float(value), counts[value % 256]) for value in range(-127, 128)]
    pairs = torch.tensor(_counts(group.weight_packed, 256)).view(16, 16)  # [high nibble, low nibble]
    counts = (pairs.sum(0) + pairs.sum(1)).tolist()
    numbers = torch.arange(16, dtype=torch.uint8)
    if group.format == "int4":
        values = [(code - 16 if code >= 8 else code) + 0.5 for code in range(16)]
    else:
        values = e2m1_decode(numbers).tolist()
    merged: dict[float, int] = {}
    for value, count in zip(values, counts, strict=True):
        merged[value + 0.0] = merged.get(value + 0.0, 0) + count  # −0 counts as 0
    return sorted(merged.items())


def _scales(group: WushGroup) -> tuple[list[tuple[int, int]], tuple[float, float] | None]:
    scale = group.weight_scale
    if scale.dtype == torch.uint8:
        counts = _counts(scale, 256)
        values = decode_scales(torch.arange(256, dtype=torch.uint8), group.format)
    else:
        bits = scale.view(torch.int16).to(torch.int32) & 0xFFFF
        counts = _counts(bits, 1 << 16)
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(scale.dtype).to(torch.float32)
    exponents = torch.frexp(values).exponent.tolist()
    known = (torch.isfinite(values) & (values > 0)).tolist()
    merged: dict[int, int] = {}
    for count, exponent, good in zip(counts, exponents, known, strict=True):
        if count and good:
            merged[exponent - 1] = merged.get(exponent - 1, 0) + count
    bad = None
    if group.format == "nvfp4":
        total = max(sum(counts), 1)
        bad = (counts[NV_NAN - 1] / total, sum(counts[:8]) / total)
    return sorted(merged.items()), bad


def _curve(values: Tensor) -> list[float]:
    """At most `POINTS` values, evenly spaced, largest first, with 4 digits."""
    values = values.flatten().sort(descending=True).values
    index = torch.linspace(0, len(values) - 1, min(POINTS, len(values))).round().long()
    return [float(f"{value:.4g}") for value in values[index].tolist()]


def _power(group: WushGroup) -> tuple[list[float], list[float]]:
    packed, scale = group.weight_packed.flatten(0, -2), group.weight_scale.flatten(0, -2)  # of all experts
    rows = packed.shape[0]
    index = torch.linspace(0, rows - 1, min(ROWS, rows)).round().long()
    q = dequantize(packed[index], scale[index], group.format)
    if group.weight_global_scale is not None:
        g = group.weight_global_scale.to(torch.float32)
        q = q / g.repeat_interleave(rows // len(g))[index, None]
    q = torch.nan_to_num(q)
    original = q  # [n, K]
    if group.input_transform is not None:
        blocks = q.unflatten(-1, (-1, group.block_size))  # [n, K/B, B]
        t = group.input_transform.to(torch.float32).expand(blocks.shape[1], -1, -1)  # [K/B, B, B]
        original = torch.bmm(blocks.transpose(0, 1), t).transpose(0, 1).flatten(1)  # [n, K]
    curves = []
    for values in (original, q):
        power = values.square().mean(0)  # [K]
        curves.append(_curve(power / power.mean().clamp(min=1e-30)))
    return curves[0], curves[1]


def _spectrum(transform: Tensor | None) -> list[float]:
    if transform is None:
        return []
    index = torch.linspace(0, len(transform) - 1, min(BLOCKS, len(transform))).round().long()
    s = torch.linalg.svdvals(torch.nan_to_num(transform[index].to(torch.float32)))
    return _curve(s / s.median().clamp(min=1e-30))
