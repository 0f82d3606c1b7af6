"""Formats against the oracle, bit for bit: every comparison here is exact."""

import shutil

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch._inductor import config as inductor
from torch.fx.experimental.proxy_tensor import make_fx

from wush_compile import formats
from wush_compile.errors import ConfigError
from wush_compile.formats import FORMATS

GLOBALS = {
    ("mxfp4", "paper"): (3.0,),
    ("nvfp4", "paper"): (10.0,),
    ("nvfp4", "absmax"): (None, 0.37, 2.0**9),
    ("nvfp4", "mse"): (None, 0.37, 2.0**9),
    ("nvfp4", "search"): (None, 0.37, 2.0**9),
}
CASES = [
    (name, rule, g)
    for name, fmt in FORMATS.items()
    for rule in fmt.scale_rules
    for g in GLOBALS.get((name, rule), (None,))
]
all_cases = pytest.mark.parametrize("format, rule, g", CASES)
all_formats = pytest.mark.parametrize("format", FORMATS)
FP4 = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


def scalar(g):
    return None if g is None else torch.tensor([g])


def f32(*bits):
    return np.array(bits, np.uint32).view(np.float32)


def bits_of(x):
    """Equal bits mean equal values, signs of zero and all; every NaN counts as one."""
    x = np.ascontiguousarray(x)
    if x.dtype != np.float32:
        return x
    return np.where(np.isnan(x), 0x7FC00000, x.view(np.uint32))


def all_bf16():
    """Every finite bf16 value as fp32, 65280 of them."""
    x = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    return x[np.isfinite(x)]


def check(x, format, rule, g=None):
    """quantize and dequantize of groups [n, G] equal the oracle's."""
    x = np.ascontiguousarray(x, np.float32)
    codes, scales = formats.quantize(torch.from_numpy(x).flatten(), format, rule, scalar(g))
    want_codes, want_scales = oracle.quantize(x, format, rule, g)
    assert codes.dtype == torch.uint8 and scales.dtype == FORMATS[format].scale_dtype
    got_scales = scales.float().numpy() if format == "int4" else scales.numpy()
    np.testing.assert_array_equal(bits_of(got_scales), bits_of(want_scales))
    low_high = want_codes[:, 0::2] | want_codes[:, 1::2] << 4
    np.testing.assert_array_equal(codes.numpy().reshape(low_high.shape), low_high)
    for units in (None, g):
        got = formats.dequantize(codes, scales, format, scalar(units)).numpy().reshape(x.shape)
        np.testing.assert_array_equal(bits_of(got), bits_of(oracle.dequantize(want_codes, want_scales, format, units)))
    return codes, scales, got


# -- exhaustive ------------------------------------------------------------------------------------------------------


@all_cases
def test_every_bf16_value_as_an_element(format, rule, g):
    """Next to neighbours of its own size, next to anything, and below six fixed maxima that set the group's scale."""
    x, size = all_bf16(), oracle.GROUP[format]
    check(x.reshape(-1, size), format, rule, g)
    check(np.random.default_rng(0).permutation(x).reshape(-1, size), format, rule, g)
    x = np.concatenate((x, np.zeros(-len(x) % (size - 1), np.float32))).reshape(-1, size - 1)
    for largest in (2.0**-120, 3e-5, 0.75, 1.0, 7.0, 2690.0, 2.0**100):
        first = np.full((len(x), 1), largest, np.float32)
        check(np.concatenate((first, x), axis=1), format, rule, g)
        check(np.concatenate((np.clip(x, -largest, largest), -first), axis=1), format, rule, g)


def test_every_bf16_value_as_e2m1():
    x = all_bf16()
    codes = formats.e2m1_encode(torch.from_numpy(x))
    np.testing.assert_array_equal(codes.numpy(), oracle.e2m1_encode(x))
    np.testing.assert_array_equal(
        bits_of(formats.e2m1_round(torch.from_numpy(x)).numpy()), bits_of(oracle.e2m1_decode(codes.numpy()))
    )


def test_every_e8m0_byte_decodes():
    values = formats.e8m0_decode(torch.arange(256, dtype=torch.uint8)).to(torch.float64)
    assert values[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)] and values[255].isnan()


def test_every_e4m3_byte_decodes():
    values = formats.e4m3_decode(torch.arange(128, dtype=torch.uint8)).to(torch.float64)
    assert values[:127].tolist() == oracle.E4M3.tolist() and values[127].isnan()
    as_torch = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    assert torch.equal(values[:127], as_torch)


def test_e4m3_encode_is_nearest_even_and_torchs_in_range():
    """All bf16 in [0, 448], every middle of two neighbours, and the fp32 values next to those."""
    middle = ((oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2).astype(np.float32)
    x = all_bf16()
    x = np.concatenate(
        (
            x[(x >= 0) & (x <= 448) & ~np.signbit(x)],
            middle,
            np.nextafter(middle, np.float32(0)),
            np.nextafter(middle, np.float32(999)),
            oracle.E4M3,
        )
    )
    x = x.astype(np.float32)
    bytes_ = formats.e4m3_encode(torch.from_numpy(x))
    np.testing.assert_array_equal(bytes_.numpy(), oracle.e4m3_encode(x))
    assert torch.equal(bytes_, torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8))


@all_formats
def test_encode_gives_back_every_code_under_every_scale(format):
    """decode then encode with the scale held is the identity, −0 included, while fp32 holds 6·scale."""
    if format == "int4":
        scales = torch.from_numpy(all_bf16()).to(torch.bfloat16)
        scales = scales[(scales >= 2.0**-125) & (scales <= 2.0**124)]
    else:
        scales = torch.arange(1, 253 if format == "mxfp4" else 0x7F, dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).expand(len(scales), 16)
    for g in (None, torch.tensor([0.37])) if format == "nvfp4" else (None,):
        assert torch.equal(formats.encode(formats.decode(codes, scales, format, g), scales, format, g), codes)


def test_pack_and_unpack_every_byte():
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = formats.unpack(packed)
    assert codes.shape == (4, 128) and torch.equal(formats.pack(codes), packed)
    assert codes[0, :4].tolist() == [0, 0, 1, 0] and codes[1, 4:6].tolist() == [2, 4]  # byte 0x42: low nibble first


# -- ties, zeros, extremes -------------------------------------------------------------------------------------------


def test_e2m1_ties_go_to_the_even_code_and_their_neighbours_do_not():
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    even = np.array([0, 2, 2, 4, 4, 6, 6], np.uint8)
    for x, codes in (
        (ties, even),
        (np.nextafter(ties, np.float32(0)), np.arange(7)),
        (np.nextafter(ties, np.float32(9)), np.arange(1, 8)),
    ):
        assert formats.e2m1_encode(torch.from_numpy(x)).tolist() == codes.tolist()
        assert formats.e2m1_encode(torch.from_numpy(-x)).tolist() == (codes + 8).tolist()


@all_cases
def test_ties_at_every_scale(format, rule, g):
    """Groups of e2m1 values and the middles between them (int4: of quarters), times every power of two fp32 has."""
    size = oracle.GROUP[format]
    pattern = np.array([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -4])
    pattern = np.resize(pattern, size)
    exponents = np.ldexp(1.0, np.arange(-150, 126))[:, None]
    for largest in (6, 6.5, 7, 4, 3, 1):
        check(np.concatenate((pattern[:-1], [largest])) * exponents / (g or 1), format, rule, g)


@pytest.mark.parametrize("g", [None, 0.37, 10.0, 17.3, 1234.5, 3e-3])
def test_nvfp4_maxima_whose_scale_lies_between_two_bytes(g):
    """fp32 maxima within 4 ulps of where a·fp32(g/6) is halfway: a·g/6 or a/6·g would round to another byte."""
    middle = (oracle.E4M3[1:] + oracle.E4M3[:-1]) / 2
    for largest in (6, 4):
        amax = (middle * largest / (g or 1)).astype(np.float32)
        x = np.zeros((9, len(amax), 16), np.float32)
        x[:, :, 0] = (amax.view(np.int32) + np.arange(-4, 5, dtype=np.int32)[:, None]).view(np.float32)
        x[:, :, 1:9] = x[:, :, :1] * np.linspace(0.1, 0.9, 8, dtype=np.float32)
        for rule in ("absmax", "mse", "search"):
            check(x.reshape(-1, 16), "nvfp4", rule, g)


@pytest.mark.parametrize("g", [None, 0.37, 10.0, 17.3, 1234.5, 3e-3])
def test_nvfp4_elements_within_ulps_of_a_tie(g):
    """Under every scale byte that its maximum fixes: x·fp32(g/scale) has two roundings, x·g·(1/scale) another three."""
    scales = oracle.E4M3[4:, None]
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.0])
    largest = np.broadcast_to(6 * scales / (g or 1), (9, 123, 1))
    at = (ties * scales / (g or 1)).astype(np.float32).view(np.uint32)
    near = (at + np.arange(-4, 5)[:, None, None] * (at & 0x7FFFFFFF > 0)).astype(np.uint32).view(np.float32)
    check(np.concatenate((largest, near), axis=-1).reshape(-1, 16), "nvfp4", "absmax", g)


@pytest.mark.parametrize("mantissa", [0x000000, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF])
@all_cases
def test_every_exponent_of_the_maximum(mantissa, format, rule, g):
    """The scale around the powers of two and 1.5 times them, from subnormal to the largest fp32."""
    largest = f32(*((np.arange(255) << 23) | mantissa))
    rest = np.random.default_rng(1).uniform(-1, 1, (255, oracle.GROUP[format] - 1)).astype(np.float32)
    check(np.concatenate((rest * largest[:, None], largest[:, None]), axis=1), format, rule, g)


def test_absmax_mxfp4_clips_nothing_and_wastes_nothing():
    """The largest value over the scale lies in (3, 6]: at the next smaller power of two it would exceed 6."""
    amax = np.abs(all_bf16())
    amax = amax[(amax >= 2.0**-120) & (amax < 2.0**126)]
    scale = formats.e8m0_decode(formats.compute_scales(torch.from_numpy(amax)[:, None], "mxfp4", "absmax"))
    ratio = amax / scale.numpy()
    assert ratio.min() > 3 and ratio.max() == 6


@all_cases
def test_zero_groups_decode_to_exact_zeros(format, rule, g):
    size = oracle.GROUP[format]
    x = np.zeros((3, size), np.float32)
    x[1] = -0.0
    x[2, ::2] = -0.0
    codes, _, decoded = check(x, format, rule, g)
    assert not decoded.any()
    if format != "int4":  # −0 keeps its sign, in the code and beyond
        assert codes.tolist() == [0] * (size // 2) + [0x88] * (size // 2) + [0x08] * (size // 2)
        np.testing.assert_array_equal(np.signbit(decoded), np.signbit(x))


@FP4
def test_zeros_beside_large_values_stay_zero(format):
    x = np.zeros((2, oracle.GROUP[format]), np.float32)
    x[0, 0], x[1, 0] = 3e38, 1e-45
    x[:, 1] = -0.0
    _, _, decoded = check(x, format, "absmax")
    assert not decoded[:, 1:].any() and np.signbit(decoded[:, 1]).all()


@all_cases
def test_subnormal_and_huge_values(format, rule, g):
    size, rng = oracle.GROUP[format], np.random.default_rng(2)
    subnormal = (rng.integers(0, 2**23, (64, size)) | rng.integers(0, 2, (64, size)) << 31).astype(np.uint32)
    huge = rng.integers(0xFD << 23, 0xFF << 23, (64, size)).astype(np.uint32)
    check(subnormal.view(np.float32), format, rule, g)
    check(np.resize(f32(1, 2, 3, 0x80000001, 0), (1, size)), format, rule, g)
    check(huge.view(np.float32), format, rule, g)
    check(np.full((1, size), np.finfo(np.float32).max), format, rule, g)


@all_cases
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_group_with_nan_or_inf_is_marked_and_alone(value, format, rule, g):
    size, rng = oracle.GROUP[format], np.random.default_rng(3)
    clean = rng.standard_normal((size, size)).astype(np.float32)
    x = np.repeat(clean, 2, axis=0)  # every second group has one bad element
    x[1::2][np.arange(size), np.arange(size)] = value
    codes, scales, decoded = check(x, format, rule, g)
    codes = codes.view(2 * size, -1)
    want_codes, want_scales, want = check(clean, format, rule, g)
    assert not codes[1::2].any() and np.isnan(decoded[1::2]).all()
    mark = {"mxfp4": 255, "nvfp4": 127}.get(format)
    assert (scales[1::2].isnan() if mark is None else scales[1::2] == mark).all()
    assert torch.equal(codes[::2].flatten(), want_codes) and torch.equal(scales[::2], want_scales)
    np.testing.assert_array_equal(decoded[::2], want)


@FP4
def test_marked_groups_decode_to_nan_whatever_their_codes(format):
    codes = torch.arange(256, dtype=torch.uint8).view(-1, oracle.GROUP[format] // 2)
    mark = torch.full((len(codes), 1), {"mxfp4": 255, "nvfp4": 127}[format], dtype=torch.uint8)
    assert formats.dequantize(codes, mark, format).isnan().all()


# -- hypothesis ------------------------------------------------------------------------------------------------------


@st.composite
def wide_groups(draw, size):
    """Groups [3, size] of any fp32 bits, or of bits near one exponent with mantissas where rounding turns."""
    if draw(st.booleans()):
        return draw(hnp.arrays(np.uint32, (3, size), elements=st.integers(0, 2**32 - 1))).view(np.float32)
    base = draw(st.integers(0, 254))
    back = draw(hnp.arrays(np.int64, (3, size), elements=st.integers(0, 6)))
    mantissa = st.sampled_from([0, 1, 0x1FFFFF, 0x200000, 0x200001, 0x3FFFFF, 0x400000, 0x400001, 0x600000, 0x7FFFFF])
    low = draw(hnp.arrays(np.int64, (3, size), elements=mantissa | st.integers(0, 2**23 - 1)))
    sign = draw(hnp.arrays(np.int64, (3, size), elements=st.integers(0, 1)))
    return (np.maximum(base - back, 0) << 23 | low | sign << 31).astype(np.uint32).view(np.float32)


@given(groups=wide_groups(32), g=st.floats(2.0**-30, 2.0**30, width=32))
def test_fp32_groups_with_wide_exponents(groups, g):
    for format, rule, fixed in CASES:
        x = groups.reshape(-1, oracle.GROUP[format])
        check(x, format, rule, fixed)
        if format == "nvfp4":
            check(x, format, rule, g)


@given(hnp.arrays(np.float32, (64,), elements=st.floats(-8, 8, width=32)))
def test_round_is_decode_of_encode(x):
    x = torch.from_numpy(x)
    rounded = formats.e2m1_decode(formats.e2m1_encode(x))
    np.testing.assert_array_equal(bits_of(formats.e2m1_round(x).numpy()), bits_of(rounded.numpy()))


# -- scale rules -----------------------------------------------------------------------------------------------------


def total_error(x, scales, format, g):
    """Σ(x − dequantized)² in float64: what `mse` means, without its order of fp32 sums."""
    decoded = formats.decode(formats.encode(x, scales, format, g), scales, format, g)
    return (x.double() - decoded.double()).square().sum(-1)


@pytest.mark.parametrize("format, g", [("mxfp4", None), ("nvfp4", None), ("nvfp4", 17.0), ("int4", None)])
def test_mse_is_the_candidate_of_least_error(format, g):
    """Every candidate is the best somewhere (else the test sees nothing), but MXFP4's b + 1: what it holds within the
    range of b, b holds as well, and b clips nothing, so it can tie but never win."""
    torch.manual_seed(4)
    g = scalar(g)
    x = torch.randn(4096, oracle.GROUP[format]) * torch.rand(4096, 1).mul(8).exp2()
    chosen = formats.compute_scales(x, format, "mse", g)
    absmax = formats.compute_scales(x, format, "absmax", g)
    if format == "mxfp4":
        candidates = [absmax, absmax - 1, absmax + 1]
    elif format == "nvfp4":
        one = torch.ones(1) if g is None else g
        narrow = formats.e4m3_encode((x.abs().amax(-1) * (one / 4)).clamp(max=448)).clamp(1, 0x7E)
        candidates = [absmax, narrow]
    else:
        candidates = [absmax, formats.compute_scales(x, format, "gaussian")]
    errors = torch.stack([total_error(x, c, format, g) for c in candidates])
    ours = total_error(x, chosen, format, g)
    assert (ours <= errors.amin(0) * (1 + 1e-5)).all()
    first = errors.argmin(0)
    sure = errors.sort(0).values
    sure = sure[0] < sure[1] * (1 - 1e-5)
    assert sure.sum() > 3000
    assert torch.equal(chosen[sure], torch.stack(candidates).gather(0, first[None])[0][sure])
    assert set(first[sure].tolist()) == {0, 1}


def sums(x, scales, g):
    """The fp32 sums that `mse` and `search` compare."""
    s = formats.e4m3_decode(scales)
    return formats.squared_error(x, (1 if g is None else g) / s, s)


@given(groups=wide_groups(16), factor=st.integers(-12, 12), g=st.sampled_from([None, 0.37, 17.0]))
def test_search_loses_to_none_of_its_four_bytes(groups, factor, g):
    """Nor to `mse` where its byte is one of them, all by the same fp32 sums."""
    x = torch.from_numpy(groups)
    x = torch.cat((x, torch.randn(256, 16, generator=torch.Generator().manual_seed(factor)) * 2.0**factor))
    x, g = x[x.isfinite().all(-1)], scalar(g)
    chosen, absmax, mse = (formats.compute_scales(x, "nvfp4", rule, g) for rule in ("search", "absmax", "mse"))
    four = torch.stack([absmax.int() + offset for offset in (0, -1, 4, 5)]).clamp(1, 0x7E).to(torch.uint8)
    errors = torch.stack([sums(x, byte, g) for byte in four])
    ours = sums(x, chosen, g)
    comparable = ~errors.isnan().any(0)
    assert torch.equal(ours[comparable], errors.amin(0)[comparable])
    among = (mse == four).any(0) & comparable
    assert (ours[among] <= sums(x, mse, g)[among]).all() and among.any()
    assert torch.equal(chosen[comparable], four.gather(0, errors.argmin(0)[None])[0][comparable])
    inside = absmax < 0x7E
    largest = x.abs().amax(-1) * (1 if g is None else g) / formats.e4m3_decode(chosen)
    assert (largest[inside] <= 10).all()  # codes are packed by sums that are right up to there


def test_search_beats_mse_but_not_in_every_group():
    """A tenth less error on normal groups. The byte for g/4 may be `absmax`'s plus 6, which `search` does not try."""
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(4)).double()
    x = (x * torch.rand(4096, 1, generator=torch.Generator().manual_seed(5)).mul(8).exp2()).float()
    chosen, absmax, mse = (formats.compute_scales(x, "nvfp4", rule) for rule in ("search", "absmax", "mse"))
    ours, theirs = ((total_error(x, s, "nvfp4", None) / x.double().square().sum(-1)) for s in (chosen, mse))
    assert 0.85 < ours.sum() / theirs.sum() < 0.93
    assert set((chosen.int() - absmax.int()).tolist()) == {0, -1, 4, 5}
    assert set((mse.int() - absmax.int()).tolist()) == {0, 4, 5, 6} and (ours > theirs).any()


@pytest.mark.parametrize("byte", [2, 3])
def test_a_scale_far_below_the_maximum_never_wins(byte):
    """Beside a maximum of more than 10 steps of the smaller byte, 15 values that it may hold better."""
    for largest in np.arange(6 * byte - 2.9, 6 * byte + 2.9, 0.125):
        for other in np.arange(0, 6 * byte, 0.125):
            x = torch.full((1, 16), other * 2.0**-9)
            x[0, 0] = largest * 2.0**-9
            if formats.compute_scales(x, "nvfp4", "absmax") == byte:
                unit = formats.e4m3_decode(formats.compute_scales(x, "nvfp4", "search")).item()
                assert largest * 2.0**-9 <= 10 * unit, (largest, other)


def test_mse_takes_the_first_candidate_on_a_tie():
    """What several scales hold exactly keeps the absmax scale."""
    x = torch.zeros(4, 32)
    x[1:, 0] = torch.tensor([4.0, 2.0, 1.0])  # exact at absmax, and at the next larger scale
    x[3, 1:] = -0.5
    assert torch.equal(formats.compute_scales(x, "mxfp4", "mse"), formats.compute_scales(x, "mxfp4", "absmax"))
    # 6·2^-9 and 4·2^-9 are exact with byte 1, and a·1.5 rounds to another byte that is exact, too.
    y = torch.zeros(2, 16)
    y[:, 0] = torch.tensor([6.0, 12.0])
    narrow = formats.e4m3_encode(y.abs().amax(-1) / 4)
    assert (total_error(y, narrow, "nvfp4", None) == 0).all()
    assert torch.equal(formats.compute_scales(y, "nvfp4", "mse"), formats.compute_scales(y, "nvfp4", "absmax"))
    y[:, 0] = torch.tensor([2.0, 4.0]) * 6.0  # absmax plus 4 holds these as 4 of its steps
    narrow = formats.e4m3_encode(y.abs().amax(-1) / 6) + 4
    assert (total_error(y, narrow, "nvfp4", None) == 0).all()
    assert torch.equal(formats.compute_scales(y, "nvfp4", "search"), formats.compute_scales(y, "nvfp4", "absmax"))


def test_mxfp4_paper_is_absmax_of_three_times_x():
    """Same codes, same scale bytes, for every bf16 maximum but a power of two: there 3·x is 6 at the scale below, and
    the paper's byte, one larger, holds the maximum exactly as well, as 3."""
    amax = np.abs(all_bf16())
    amax = amax[(amax >= 2.0**-115) & (amax < 2.0**120)]
    rest = np.random.default_rng(5).uniform(-1, 1, (len(amax), 31)).astype(np.float32)
    x = torch.from_numpy(np.concatenate((amax[:, None], amax[:, None] * rest), axis=1))
    codes, scales = formats.quantize(x, "mxfp4", "paper", scalar(3.0))
    tripled_codes, tripled_scales = formats.quantize(3 * x, "mxfp4", "absmax")
    power = torch.from_numpy(np.frexp(amax)[0] == 0.5)
    assert torch.equal(codes[~power], tripled_codes[~power]) and torch.equal(scales[~power], tripled_scales[~power])
    assert torch.equal(scales[power], tripled_scales[power] + 1)
    assert (formats.unpack(codes[power])[:, 0] == 5).all() and (formats.unpack(tripled_codes[power])[:, 0] == 7).all()


# -- idempotence -----------------------------------------------------------------------------------------------------


def random_groups(size):
    torch.manual_seed(6)
    return torch.randn(2048, size) * torch.randn(2048, 1).mul(6).exp2()


@pytest.mark.parametrize("rule", ["absmax", "ocp", "mse"])
def test_quantizing_mxfp4_again_changes_no_value(rule):
    """`ocp` keeps the bytes, too (its largest code is 4 or 6). The others may find a finer scale that holds the same
    values (a largest code of 3 becomes 6 at half the scale), and keep the bytes where there is none."""
    codes, scales = formats.quantize(random_groups(32), "mxfp4", rule)
    x = formats.dequantize(codes, scales, "mxfp4")
    again = formats.quantize(x, "mxfp4", rule)
    assert torch.equal(formats.dequantize(*again, "mxfp4"), x)
    full = (formats.unpack(codes).view(-1, 32) & 7).amax(-1) >= 6
    same = torch.ones_like(full) if rule == "ocp" else full
    assert same.any() and torch.equal(again[0][same], codes[same]) and torch.equal(again[1][same], scales[same])


@pytest.mark.parametrize("g", [None, 0.37, 448.0])
def test_quantizing_nvfp4_absmax_again_changes_nothing(g):
    """From scale byte 4 up the largest value is 6; below, bytes lie so far apart that it may be 4: the scale moves."""
    g = scalar(g)
    codes, scales = formats.quantize(random_groups(16), "nvfp4", "absmax", g)
    again = formats.quantize(formats.dequantize(codes, scales, "nvfp4", g), "nvfp4", "absmax", g)
    firm = scales[:, 0] >= 4
    assert firm.sum() > 1000
    assert torch.equal(again[0][firm], codes[firm]) and torch.equal(again[1][firm], scales[firm])


# -- the interface ---------------------------------------------------------------------------------------------------


@all_formats
def test_shapes_and_dtypes(format):
    size = oracle.GROUP[format]
    for lead in ((), (0,), (3,), (2, 0), (2, 5)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(*lead, 3 * size).to(dtype)
            codes, scales = formats.quantize(x, format, "absmax")
            assert codes.shape == (*lead, 3 * size // 2) and scales.shape == (*lead, 3)
            assert scales.dtype == formats.get_format(format).scale_dtype
            wide = formats.quantize(x.float(), format, "absmax")  # bf16 and fp16 count as their fp32 values
            assert torch.equal(codes, wide[0]) and torch.equal(scales, wide[1])
            decoded = formats.dequantize(codes, scales, format)
            assert decoded.shape == x.shape and decoded.dtype == torch.float32


def test_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match="mxfp4"):
        formats.get_format("mxpf4")


# -- compilation -----------------------------------------------------------------------------------------------------


def hard_groups(size):
    """Ties, zeros of both signs, subnormals, extremes, NaN, Inf, and normal values: every branch of the quantizers."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((96, size)) * 2.0 ** rng.integers(-20, 20, (96, 1))
    x[:32] = rng.integers(-24, 25, (32, size)) / 4 * 2.0 ** rng.integers(-140, 120, (32, 1))
    x[32] = 0
    x[33] = -0.0
    x[34, 3], x[35, 5], x[36, 0] = np.nan, -np.inf, 3.4e38
    return torch.from_numpy(x.astype(np.float32))


@all_formats
def test_the_traced_quantizer_holds_no_constants(format):
    graph = make_fx(lambda x, g: formats.quantize(x, format, "mse", g))(torch.randn(2, 64), torch.ones(1)).graph
    assert not [node for node in graph.nodes if node.op == "get_attr"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@all_formats
def test_inductor_equals_eager(format):
    """One graph without breaks, no fused multiply-add, no reordered sums: codes and scales keep their bits."""
    x, g = hard_groups(oracle.GROUP[format]), torch.tensor([1.7]) if format == "nvfp4" else None
    codes, scales = formats.quantize(x, format, "mse", g)
    compiled = torch.compile(formats.quantize, fullgraph=True, dynamic=False)
    # By default Inductor pastes the tree of sums into itself at every level; with this it compiles in half the time.
    with inductor.patch(realize_opcount_threshold=10):
        got_codes, got_scales = compiled(x, format, "mse", g)
    assert torch.equal(got_codes, codes)
    np.testing.assert_array_equal(bits_of(got_scales.float().numpy()), bits_of(scales.float().numpy()))
