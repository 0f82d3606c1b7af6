"""A second implementation of the formats, from docs/spec.md §4 alone: tables and float64 in numpy.

The library must agree bit for bit. Values are found by search in a table of what the format can hold; exponents come
from `frexp`. Only what the specification defines as an fp32 operation is one here: `a·fp32(g/6)`, `fp32(g/scale)`,
`x·inv`, the products of decoding, and the sums of the `mse` rule (neighbours 2i and 2i + 1, until one is left).
Codes are one a byte.
"""

from collections.abc import Callable

import numpy as np

F32 = np.float32
GROUP = {"mxfp4": 32, "nvfp4": 16, "int4": 32, "int8": 32}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(8 * (e > 0) + m) * 2.0 ** (max(e, 1) - 10) for e in range(16) for m in range(8)])[:127]


def nearest_even(table: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Index of the table's nearest value, the even index on a tie, the last one above the table; exact in float64."""
    middle = (table[1:] + table[:-1]) / 2
    magnitude = magnitude.astype(np.float64)
    below = np.searchsorted(middle, magnitude, "left")  # middles strictly below the value
    tie = magnitude == middle[np.minimum(below, len(middle) - 1)]
    return below + (tie & (below % 2 == 1))


def bf16(x: np.ndarray) -> np.ndarray:
    """fp32 -> the nearest bf16, ties to even, as fp32."""
    bits = np.asarray(x, F32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), F32(np.nan), bits.astype(np.uint32).view(F32))


def e2m1_encode(x: np.ndarray) -> np.ndarray:
    return (nearest_even(E2M1, np.abs(x)) + 8 * np.signbit(x)).astype(np.uint8)


def e2m1_decode(codes: np.ndarray) -> np.ndarray:
    return np.where(codes >= 8, -E2M1[codes & 7], E2M1[codes & 7]).astype(F32)


def e4m3_encode(x: np.ndarray) -> np.ndarray:
    return nearest_even(E4M3, np.minimum(x, 448))


def tree_sum(x: np.ndarray) -> np.ndarray:
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def first_least(candidates: list[np.ndarray], errors: list[np.ndarray]) -> np.ndarray:
    """For every group the candidate of least error, the first on a tie."""
    return np.choose(np.argmin(np.stack(errors), axis=0), candidates)


def squared_error(x: np.ndarray, inverse: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Of v = x·inverse, the fp32 sum of ((v − e2m1(v))·unit)², in the order of `formats.squared_error`."""
    v = x * inverse[..., None]
    d = (v - e2m1_decode(e2m1_encode(v))) * unit[..., None]
    return tree_sum(d * d)


def mxfp4_bytes(x: np.ndarray, rule: str) -> np.ndarray:
    a = np.abs(x).max(-1).astype(np.float64)
    mantissa, exponent = np.frexp(a)  # a = mantissa·2^exponent, mantissa in [½, 1)
    biased = np.where(a > 0, exponent - 1 + 127, -1000)
    if rule == "paper":
        return np.clip(biased, 1, 254)
    if rule == "ocp":
        return np.clip(biased - 2, 1, 254)
    b = np.clip(biased - 2 + (2 * mantissa > 1.5), 1, 254)
    if rule == "absmax":
        return b
    # What byte b - 1 gains, value by value, exact in fp32:
    # twice (x/2^b - its e2m1)^2 - (x/2^b - half the e2m1 of twice x/2^b)^2.
    # Byte b + 1 can tie at best: nothing is clipped at b, which holds all that b + 1 holds up to there.
    v = np.ldexp(x.astype(np.float64), (127 - b)[..., None])
    d0, d1 = (v - e2m1_decode(e2m1_encode(v * n)).astype(np.float64) / n for n in (1, 2))
    return np.where(tree_sum((2 * (d0 - d1) * (d0 + d1)).astype(F32)) > 0, np.clip(b - 1, 1, 254), b)


def nvfp4_bytes(x: np.ndarray, rule: str, g: np.float32) -> np.ndarray:
    a = np.abs(x).max(-1)
    candidates = [np.clip(e4m3_encode(a * (g / F32(largest))), 0x01, 0x7E) for largest in (6, 4)]
    if rule == "search":
        candidates = [np.clip(candidates[0] + offset, 0x01, 0x7E) for offset in (0, -1, 4, 5)]
    elif rule != "mse":
        return candidates[0]
    scales = [E4M3[c].astype(F32) for c in candidates]
    return first_least(candidates, [squared_error(x, g / s, s) for s in scales])


def int4_scales(x: np.ndarray, rule: str) -> np.ndarray:
    absmax = bf16(np.abs(x).max(-1) / F32(8))
    if rule == "absmax":
        return absmax
    rms = np.sqrt(tree_sum(x * x) / F32(x.shape[-1]))
    gaussian = bf16(rms * F32(2 * 2.513930578568423 / 15))
    if rule != "mse":
        return gaussian
    candidates = [absmax, gaussian]
    errors = []
    for scale in candidates:
        d = x - int4_decode(int4_encode(x, scale), scale)
        errors.append(tree_sum(d * d))
    return first_least(candidates, errors)


def int4_encode(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    ok = scale[..., None] > 0
    q = np.clip(np.floor(x / np.where(ok, scale[..., None], F32(1))), -8, 7)
    return (np.where(ok, q, 0).astype(np.int64) % 16).astype(np.uint8)


def int4_decode(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    c = np.where(codes >= 8, codes.astype(np.int64) - 16, codes)
    return (c.astype(F32) + F32(0.5)) * scale[..., None]


def int8_scales(x: np.ndarray) -> np.ndarray:
    return bf16(np.abs(x).max(-1) * F32(1 / 127))


def int8_encode(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    ok = scale[..., None] > 0
    q = np.clip(np.rint(x / np.where(ok, scale[..., None], F32(1))), -127, 127)  # ties to even
    return (np.where(ok, q, 0).astype(np.int64) % 256).astype(np.uint8)


def int8_decode(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return codes.astype(np.int8).astype(F32) * scale[..., None]


def silent(f: Callable) -> Callable:
    """Overflow to Inf and Inf − Inf are part of the contract, not warnings."""

    def run(*args):
        with np.errstate(all="ignore"):
            return f(*args)

    return run


@silent
def quantize(x: np.ndarray, format: str, rule: str, g: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """fp32 groups [.., G] -> (codes uint8 [.., G], scales [..]: bytes, or fp32 that bf16 holds for int4)."""
    x = np.asarray(x, F32)
    g = F32(1 if g is None else g)
    bad = ~np.isfinite(x).all(-1)
    x = np.where(bad[..., None], F32(0), x)
    if format == "int4":
        scales = int4_scales(x, rule)
        codes = int4_encode(x, scales)
        mark = F32(np.nan)
    elif format == "int8":
        scales = int8_scales(x)
        codes = int8_encode(x, scales)
        mark = F32(np.nan)
    elif format == "mxfp4":
        scales = mxfp4_bytes(x, rule).astype(np.uint8)
        codes = e2m1_encode(x * (g * np.ldexp(F32(1), 127 - scales.astype(int)))[..., None])
        mark = 0xFF
    else:
        scales = nvfp4_bytes(x, rule, g).astype(np.uint8)
        codes = e2m1_encode(x * (g / E4M3[scales].astype(F32))[..., None])
        mark = 0x7F
    return np.where(bad[..., None], 0, codes).astype(np.uint8), np.where(bad, mark, scales).astype(scales.dtype)


@silent
def dequantize(codes: np.ndarray, scales: np.ndarray, format: str, g: float | None = None) -> np.ndarray:
    """The inverse: fp32 [.., G], without g in the units of the matmul's operand, with it in those of x."""
    if format == "int4":
        return int4_decode(codes, scales)
    if format == "int8":
        return int8_decode(codes, scales)
    if format == "mxfp4":
        factor = np.where(scales == 0xFF, F32(np.nan), np.ldexp(F32(1), np.minimum(scales, 254).astype(int) - 127))
    else:
        factor = np.where(scales == 0x7F, np.nan, E4M3[np.minimum(scales, 0x7E)]).astype(F32)
    x = e2m1_decode(codes) * factor[..., None]
    return x if g is None else x / F32(g)
