"""The ops on a CPU: schemas, shapes, exact numerics against the oracle, and what they refuse.

Transforms here hold small integers, and so do the inputs they are applied to: every sum is exact in fp32 in any order,
so that codes can be compared with the float64 oracle bit for bit.
"""

import itertools
import re

import oracle
import pytest
import torch
from torch.library import opcheck

from wush_compile import formats
from wush_compile.formats import FORMATS
from wush_compile.ops import core as ops

wush = torch.ops.wush
LEADS = [(), (0,), (1,), (3,), (17,), (129,), (2, 0), (2, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
all_formats = pytest.mark.parametrize("format", FORMATS)
CPU_AND_META = [("cpu", "meta"), ("meta", "cpu")]


def global_scale(format, g=3.0):
    return torch.tensor([g]) if format == "nvfp4" else None


def integer_input(*shape, dtype=torch.float32):
    """Integers up to 15, rows of different sizes."""
    x = torch.randint(-15, 16, shape)
    return (x >> torch.randint(0, 3, (*shape[:-1], 1))).to(dtype)


def integer_transform(k, kind, size):
    """None, or small integers [1, B, B] (`shared`) or [K/B, B, B] (`blocks`)."""
    if kind == "none":
        return None
    return torch.randint(-3, 4, (1 if kind == "shared" else k // size, size, size)).to(torch.bfloat16)


def transformed(x, transform):
    """Blockwise x Tᵀ in float64, written with loops."""
    x = x.double()
    if transform is None:
        return x
    size = transform.shape[-1]
    out = torch.empty_like(x)
    for b in range(x.shape[-1] // size):
        block = slice(b * size, (b + 1) * size)
        out[..., block] = x[..., block] @ transform[b % transform.shape[0]].double().T
    return out


def packed_oracle(x, format, rule, g=None):
    """Float64 [.., K] that fp32 holds -> (packed codes, scales) of the oracle, as tensors."""
    size = oracle.GROUP[format]
    groups = x.float().unflatten(-1, (-1, size)).numpy()
    codes, scales = oracle.quantize(groups, format, rule, None if g is None else g.item())
    packed = torch.from_numpy(codes[..., 0::2] | codes[..., 1::2] << 4).flatten(-2)
    return packed, torch.from_numpy(scales).to(FORMATS[format].scale_dtype)


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def quantized(rows, k, format, g=None):
    """Random rows in the format: (codes, scales)."""
    return formats.quantize(torch.randn(*rows, k), format, "absmax", g)


def new_state(k, block=None, rows=16, dtype=torch.float32):
    moment = torch.zeros(k, k) if block is None else torch.zeros(k // block, block, block)
    return moment, torch.zeros((), dtype=torch.int64), torch.zeros(rows, k, dtype=dtype)


def observed(*batches, block=None, rows=16, seed=0):
    """State after batches, each x or (x, mask)."""
    batches = [b if isinstance(b, tuple) else (b, None) for b in batches]
    state = new_state(batches[0][0].shape[-1], block, rows, batches[0][0].dtype)
    for x, mask in batches:
        wush.observe(x, mask, *state, seed)
    return state


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- schemas, fakes, functionalization -------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_observe(block, masked):
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]) if masked else None
    opcheck(wush.observe.default, (torch.randn(2, 3, 64).bfloat16(), mask, *new_state(64, block), 5))


@pytest.mark.parametrize(
    "format, rule, kind, width",
    [
        ("mxfp4", "absmax", "none", 1),
        ("mxfp4", "mse", "shared", 1),
        ("mxfp4", "ocp", "blocks", 2),
        ("nvfp4", "mse", "blocks", 1),
        ("nvfp4", "absmax", "shared", 2),
        ("int4", "gaussian", "blocks", 1),
    ],
)
def test_opcheck_transform_quantize(format, rule, kind, width):
    transform = integer_transform(128, kind, width * oracle.GROUP[format])
    opcheck(wush.transform_quantize.default, (torch.randn(2, 3, 128), transform, global_scale(format), format, rule))


@all_formats
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck_fp4_linear(format, extras):
    x, w, g = quantized((2, 3), 64, format), quantized((5,), 64, format), global_scale(format)
    bias, residual = (torch.randn(5).bfloat16(), torch.randn(2, 3, 5).bfloat16()) if extras else (None, None)
    opcheck(wush.fp4_linear.default, (*x, g, *w, g, bias, residual, format, torch.bfloat16))


@all_formats
def test_fakes_give_the_shapes_and_dtypes_of_the_real(format):
    for lead in LEADS:
        x = torch.randn(*lead, 64)
        real = wush.transform_quantize(x, None, None, format, "absmax")
        fake = wush.transform_quantize(x.to("meta"), None, None, format, "absmax")
        assert [(a.shape, a.dtype) for a in fake] == [(a.shape, a.dtype) for a in real]
        w = quantized((5,), 64, format)
        y = wush.fp4_linear(*real, None, *w, None, None, None, format, torch.float16)
        meta = [a.to("meta") for a in (*real, *w)]
        fake = wush.fp4_linear(*meta[:2], None, *meta[2:], None, None, None, format, torch.float16)
        assert y.shape == fake.shape == (*lead, 5) and y.dtype == fake.dtype == torch.float16


# -- transform_quantize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, width", [("none", 1), ("shared", 1), ("shared", 2), ("blocks", 1), ("blocks", 2)])
@pytest.mark.parametrize("format, rule", [(name, rule) for name, fmt in FORMATS.items() for rule in fmt.scale_rules])
def test_transform_quantize_equals_the_oracle(format, rule, kind, width):
    size = width * oracle.GROUP[format]
    k = 3 * size
    g = global_scale(format)
    if rule == "paper" and format != "int4":
        g = torch.tensor([{"mxfp4": 3.0, "nvfp4": 10.0}[format]])
    transform = integer_transform(k, kind, size)
    for lead, dtype in zip(LEADS, itertools.cycle(DTYPES)):
        x = integer_input(*lead, k, dtype=dtype)
        assert_same(
            wush.transform_quantize(x, transform, g, format, rule),
            packed_oracle(transformed(x, transform), format, rule, g),
        )


@all_formats
def test_the_transformed_activation_is_not_rounded_before_the_quantizer(format):
    k = 4 * oracle.GROUP[format]
    x = torch.randint(-127, 128, (64, k)).bfloat16()
    transform = integer_transform(k, "blocks", oracle.GROUP[format])
    exact = transformed(x, transform)
    want = packed_oracle(exact, format, "mse", global_scale(format))
    assert_same(wush.transform_quantize(x, transform, global_scale(format), format, "mse"), want)
    rounded = packed_oracle(exact.bfloat16(), format, "mse", global_scale(format))
    assert not torch.equal(want[0], rounded[0])  # the comparison can tell


@pytest.mark.parametrize("kind", ["none", "shared", "blocks"])
@all_formats
def test_strided_input_equals_contiguous(format, kind):
    transform = integer_transform(128, kind, 32)
    wide = integer_input(6, 7, 256)
    repeated = wide[:1, :, :128].expand(3, 7, 128)
    for x in (wide[..., ::2], wide[::2, 1:, 64:192], wide.transpose(0, 1)[..., :128], repeated):
        assert_same(
            wush.transform_quantize(x, transform, None, format, "absmax"),
            wush.transform_quantize(x.contiguous(), transform, None, format, "absmax"),
        )


@pytest.mark.parametrize("kind", ["none", "shared", "blocks"])
def test_chunks_change_nothing(kind, monkeypatch):
    x, transform = integer_input(37, 128), integer_transform(128, kind, 32)
    whole = wush.transform_quantize(x, transform, None, "mxfp4", "mse")
    for elements in (1, 128, 5 * 128 + 1, 36 * 128, 37 * 128):
        monkeypatch.setattr(ops, "CHUNK_ELEMENTS", elements)
        assert_same(wush.transform_quantize(x, transform, None, "mxfp4", "mse"), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["none", "shared", "blocks"])
@all_formats
def test_a_bad_value_stays_in_its_row_and_block(format, kind, value):
    size = oracle.GROUP[format]
    x, transform = integer_input(5, 4 * size), integer_transform(4 * size, kind, size)
    codes, scales = wush.transform_quantize(x, transform, None, format, "absmax")
    x[2, size] = value
    bad_codes, bad_scales = wush.transform_quantize(x, transform, None, format, "absmax")
    assert formats.dequantize(bad_codes, bad_scales, format)[2, size : 2 * size].isnan().all()
    codes[2, size // 2 : size] = 0
    scales[2, 1] = {"mxfp4": 255, "nvfp4": 127, "int4": float("nan")}[format]
    assert_same((bad_codes, bad_scales), (codes, scales))


# -- fp4_linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
@all_formats
def test_fp4_linear_equals_the_float64_product(format, lead):
    """|error| ≤ (K + 8)·2⁻²⁴ · (Σ|x||w| / g + |bias|): K fp32 products and sums in any order, and the few roundings of
    decoding, 1/g, and bias."""
    k, n = 192, 23
    gx, gw = global_scale(format, 3.0), global_scale(format, 0.7)
    x, w = quantized(lead, k, format, gx), quantized((n,), k, format, gw)
    bias = torch.randn(n).bfloat16()
    wide = []
    for codes, scales in (x, w):
        groups = formats.unpack(codes).unflatten(-1, (-1, oracle.GROUP[format])).numpy()
        held = scales.float().numpy() if format == "int4" else scales.numpy()
        wide.append(torch.from_numpy(oracle.dequantize(groups, held, format)).flatten(-2).double())
    g = 1.0 if gx is None else gx.double() * gw.double()
    want = wide[0] @ wide[1].T / g
    size = wide[0].abs() @ wide[1].abs().T / g
    for b in (None, bias):
        y = wush.fp4_linear(*x, gx, *w, gw, b, None, format, torch.float32)
        offset = 0.0 if b is None else b.double()
        assert y.shape == (*lead, n) and y.dtype == torch.float32
        bound = (k + 8) * 2.0**-24 * (size + abs(offset))
        assert ((y.double() - (want + offset)).abs() <= bound).all()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@all_formats
def test_one_rounding_then_the_residual_in_out_dtype(format, out_dtype):
    g = global_scale(format, 5.0)
    x, w = quantized((2, 9), 128, format, g), quantized((40,), 128, format, g)
    bias, residual = torch.randn(40), torch.randn(2, 9, 40)
    wide = wush.fp4_linear(*x, g, *w, g, bias, None, format, torch.float32)
    y = wush.fp4_linear(*x, g, *w, g, bias, None, format, out_dtype)
    assert_same([y], [wide.to(out_dtype)])
    without = wush.fp4_linear(*x, g, *w, g, None, None, format, torch.float32)
    assert not torch.equal(y, without.to(out_dtype) + bias.to(out_dtype))  # the bias is added before the rounding
    added = wush.fp4_linear(*x, g, *w, g, bias, residual.to(out_dtype), format, out_dtype)
    assert_same([added], [wide.to(out_dtype) + residual.to(out_dtype)])
    assert not torch.equal(added, (wide + residual.to(out_dtype).float()).to(out_dtype))
    mixed = wush.fp4_linear(*x, g, *w, g, bias, residual.to(out_dtype).float(), format, out_dtype)
    assert_same([mixed], [added])  # a wider residual does not widen the output


def test_either_global_scale_alone():
    x, w, g = quantized((3,), 64, "nvfp4"), quantized((5,), 64, "nvfp4"), torch.tensor([4.0])
    plain = wush.fp4_linear(*x, None, *w, None, None, None, "nvfp4", torch.float32)
    for gx, gw, factor in ((g, None, 4), (None, g, 4), (g, g, 16)):
        assert torch.equal(wush.fp4_linear(*x, gx, *w, gw, None, None, "nvfp4", torch.float32), plain / factor)


@all_formats
def test_leading_dimensions_are_free(format):
    w = quantized((5,), 64, format)
    for lead in LEADS:
        codes, scales = quantized(lead, 64, format)
        flat = wush.fp4_linear(
            codes.reshape(-1, 32),
            scales.reshape(-1, scales.shape[-1]),
            None,
            *w,
            None,
            None,
            None,
            format,
            torch.float32,
        )
        y = wush.fp4_linear(codes, scales, None, *w, None, None, None, format, torch.float32)
        assert_same([y], [flat.view(*lead, 5)])


@all_formats
def test_strided_codes_and_row_ranges_equal_contiguous(format):
    x, w = quantized((3, 10), 64, format), quantized((40,), 64, format)
    strided = [a.transpose(0, 1)[::2] for a in x]
    rows = [a[8:30] for a in w]  # how siblings lie in one buffer
    y = wush.fp4_linear(*strided, None, *rows, None, None, None, format, torch.float32)
    dense = [a.contiguous() for a in strided], [a.clone() for a in rows]
    want = wush.fp4_linear(*dense[0], None, *dense[1], None, None, None, format, torch.float32)
    assert y.shape == (5, 3, 22)
    assert_same([y], [want])


@all_formats
def test_a_nan_row_stays_in_its_row(format):
    w = quantized((5,), 64, format)
    x = torch.randn(7, 64)
    clean = wush.fp4_linear(*formats.quantize(x, format, "absmax"), None, *w, None, None, None, format, torch.float32)
    x[3, 11] = float("nan")
    y = wush.fp4_linear(*formats.quantize(x, format, "absmax"), None, *w, None, None, None, format, torch.float32)
    assert y[3].isnan().all()
    keep = torch.arange(7) != 3
    assert torch.equal(y[keep], clean[keep])


# -- observe ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_observe_moment_and_count(block, dtype):
    x = integer_input(4, 9, 48, dtype=dtype)  # integers: the fp32 sums are exact
    moment, count, _ = observed(x, x[:1, :0], x[0, 0], block=block)
    rows = torch.cat((x.flatten(0, 1), x[0, :1])).double()
    full = rows.T @ rows
    if block is not None:
        full = torch.stack([full[i : i + 16, i : i + 16] for i in range(0, 48, 16)])
    assert torch.equal(moment.double(), full) and count.item() == 37


@pytest.mark.gpu
@pytest.mark.parametrize("block", [None, 32])
def test_observe_does_not_wait_for_the_gpu(block):
    """The results are those of a CPU."""
    batches = [torch.randn(70, 64).bfloat16() for _ in range(3)]
    state = [s.cuda() for s in new_state(64, block, 32, torch.bfloat16)]
    moved = [b.cuda() for b in batches]
    wush.observe(moved[0], None, *state, 5)  # the first call finds out what the device can do
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in moved[1:]:
            wush.observe(x, None, *state, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moment, count, sample = observed(*batches, block=block, rows=32, seed=5)
    torch.testing.assert_close(state[0].cpu(), moment, rtol=1e-5, atol=1e-4)
    assert count == state[1].cpu() and torch.equal(state[2].cpu()[:28], sample[:28])
    assert set(map(tuple, state[2].cpu()[28:].tolist())) == set(map(tuple, sample[28:].tolist()))


@pytest.mark.parametrize("block", [None, 16])
def test_observe_accumulates_in_fp32(block):
    """Of fp32 values: |error| ≤ (n + 1)·2⁻²⁴ · Σ|x||x| for n rows, whatever the order of the sums."""
    x = torch.randn(300, 48) * torch.rand(300, 1).mul(16).exp2()
    moment = observed(*x.split(70), block=block)[0].double()
    blocks = x.double().unflatten(1, (-1, block or 48)).transpose(0, 1)  # [K/B, n, B]
    want, size = (a.transpose(1, 2) @ a for a in (blocks, blocks.abs()))
    assert ((moment.view_as(want) - want).abs() <= 301 * 2.0**-24 * size).all()


@pytest.mark.parametrize("block", [None, 16])
def test_masked_rows_are_as_if_removed(block):
    x, mask = torch.randn(6, 11, 48), torch.rand(6, 11) < 0.6
    x[~mask] = float("nan")
    removed = observed(x[mask], block=block)
    for as_type in (torch.bool, torch.int64, torch.float32):
        assert_same(observed((x, mask.to(as_type)), block=block), removed)
    assert not removed[0].isnan().any() and not removed[2].isnan().any()


def test_a_batch_masked_out_or_empty_changes_nothing():
    x = torch.randn(3, 5, 32)
    state = observed(x)
    assert_same(observed(x, (x, torch.zeros(3, 5)), x[:0], x[:, :0]), state)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 64])
@pytest.mark.parametrize("cut", [1, 50, 64, 250])
def test_batches_cut_anywhere_give_the_same_sample(rows, cut):
    x = torch.randn(300, 16)
    _, count, sample = observed(x, rows=rows)
    _, cut_count, cut_sample = observed(x[:cut], x[cut:].view(-1, 2, 16) if cut % 2 == 0 else x[cut:], rows=rows)
    assert torch.equal(sample, cut_sample) and count == cut_count == 300


def test_strided_observations_equal_contiguous():
    x = torch.randn(5, 40, 64).transpose(0, 1)[..., ::2]
    assert_same(observed(x), observed(x.contiguous()))


def test_sample_holds_rows_and_the_largest_among_them():
    x = torch.randn(1000, 16)
    x[[3, 500, 501, 999]] *= 1e3
    for seed in range(8):
        _, _, sample = observed(*x.split(77), rows=64, seed=seed)
        kept = (sample[:, None] == x).all(-1)  # [64, 1000]
        assert (kept.sum(1) == 1).all()  # every slot holds one observed row
        assert kept[:56].sum(0).max() == 1  # the uniform part holds no row twice
        largest = x.square().sum(-1).topk(8).indices
        assert kept[:, largest].any(0).all()


def test_a_sample_larger_than_the_data_holds_every_row_in_order():
    x = torch.randn(50, 16)
    _, _, sample = observed(*x.split(13), rows=64)
    assert torch.equal(sample[:50], x) and not sample[50:56].any()


def test_the_reservoir_is_uniform_and_seeded():
    """Each tenth of the rows fills a tenth of the 56 slots: over 100 seeds 560 ± 22 times, here within 5 of those.
    A row is taken by 5.6 ± 2.3 seeds; were some preferred, the variance would tell."""
    n, seeds = 1000, 100
    x = torch.zeros(n, 2)
    x[:, 0] = torch.arange(n)
    taken = torch.zeros(n)
    samples = set()
    for seed in range(seeds):
        sample = observed(x, rows=64, seed=seed)[2][:56, 0]
        taken[sample.long()] += 1
        samples.add(tuple(sample.tolist()))
    assert len(samples) == seeds and torch.equal(observed(x, rows=64, seed=seeds - 1)[2][:56, 0], sample)
    assert (taken.view(10, -1).sum(1) - 560).abs().max() < 5 * (5600 * 0.1 * 0.9) ** 0.5
    assert 0.8 < taken.var() / (5.6 * (1 - 56 / n)) < 1.25 and taken.max() < 30


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_unknown_names_raise(device):
    x = torch.randn(2, 64, device=device)
    with pytest.raises(ValueError, match="mxfp4"):
        wush.transform_quantize(x, None, None, "mxfp5", "absmax")
    for format, rule in (("mxfp4", "gaussian"), ("nvfp4", "ocp"), ("int4", "ocp"), ("mxfp4", "")):
        with pytest.raises(ValueError, match=f"{format}.*absmax"):
            wush.transform_quantize(x, None, None, format, rule)
    codes, scales = (a.to(device) for a in quantized((2,), 64, "mxfp4"))
    with pytest.raises(ValueError, match="mxfp4"):
        wush.fp4_linear(codes, scales, None, codes, scales, None, None, None, "mxfp5", torch.float32)


@pytest.mark.parametrize("device, other", CPU_AND_META)
def test_operands_on_two_devices_raise(device, other):
    """A fake gets the call as soon as one operand is on meta (offloaded): it must not answer for the others."""
    x, transform, g = torch.randn(2, 64).to(device), torch.randn(1, 32, 32), torch.ones(1)
    for extra in ((transform.to(other), None), (None, g.to(other))):
        with pytest.raises(RuntimeError, match=f"{device}.*{other}"):
            wush.transform_quantize(x, *extra, "nvfp4", "absmax")
    codes, scales = quantized((2,), 64, "nvfp4")
    good = dict(
        codes=codes,
        scales=scales,
        global_scale=torch.ones(1),
        weight_codes=codes,
        weight_scales=scales,
        weight_global_scale=torch.ones(1),
        bias=torch.ones(2),
        residual=torch.ones(2, 2),
    )
    wush.fp4_linear(**good, format="nvfp4", out_dtype=torch.float32)
    for name in good:
        moved = {key: value.to(other if key == name else device) for key, value in good.items()}
        with pytest.raises(RuntimeError, match="is on"):
            wush.fp4_linear(**moved, format="nvfp4", out_dtype=torch.float32)
    good = dict(
        x=torch.randn(2, 64),
        mask=torch.ones(2),
        moment=torch.zeros(64, 64),
        count=torch.zeros((), dtype=torch.int64),
        sample=torch.zeros(8, 64),
    )
    for name in good:
        moved = {key: value.to(other if key == name else device) for key, value in good.items()}
        with pytest.raises(RuntimeError, match="is on"):
            wush.observe(**moved)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_that_do_not_fit_raise(device):
    def quantize(shape, transform, format="mxfp4"):
        transform = None if transform is None else torch.zeros(transform, device=device)
        wush.transform_quantize(torch.zeros(shape, device=device), transform, None, format, "absmax")

    for shape, transform, format in [
        ((4, 48), None, "mxfp4"),
        ((2, 8), None, "nvfp4"),
        ((4, 64), (4, 32, 32), "mxfp4"),
        ((4, 128), (2, 32, 32), "mxfp4"),
        ((4, 96), (1, 64, 64), "mxfp4"),
        ((4, 32), (1, 64, 64), "mxfp4"),
    ]:
        with pytest.raises(RuntimeError):
            quantize(shape, transform, format)
    x = [a.to(device) for a in quantized((2,), 64, "mxfp4")]
    w = [a.to(device) for a in quantized((5,), 96, "mxfp4")]
    with pytest.raises(RuntimeError):
        wush.fp4_linear(*x, None, *w, None, None, None, "mxfp4", torch.float32)
    for moment in ((32, 32), (3, 16, 16), (2, 16, 16), (128, 128)):
        state = [torch.zeros(moment), torch.zeros((), dtype=torch.int64), torch.zeros(8, 64)]
        with pytest.raises(RuntimeError):
            wush.observe(torch.randn(3, 64).to(device), None, *(a.to(device) for a in state))


@pytest.mark.parametrize(
    "device,op", [("cpu", wush.fp4_linear), ("cpu", ops.REFERENCE["fp4_linear"]), ("meta", wush.fp4_linear)]
)
def test_what_a_weight_has_by_row_must_fit_its_rows(device, op):
    x, w = ([a.to(device) for a in quantized((rows,), 64, "mxfp4")] for rows in (3, 5))

    def linear(g, bias=None):
        op(*x, None, *w, g, bias, None, "mxfp4", torch.float32)

    linear(torch.ones(5, dtype=torch.bfloat16, device=device), torch.ones(5, device=device))
    for shape, dtype in [
        ((4,), torch.bfloat16),
        ((1,), torch.bfloat16),
        ((5, 1), torch.bfloat16),
        ((5,), torch.float32),
    ]:
        with pytest.raises(RuntimeError, match=rf"{re.escape(str(shape))}; of a weight with 5 rows it is .*\(5,\)"):
            linear(torch.ones(shape, dtype=dtype, device=device))
    with pytest.raises(RuntimeError, match=r"the bias is \(1,\), the weight has 5 rows"):
        linear(None, torch.ones(1, device=device))
    experts = [a[None].expand(2, *a.shape) for a in w]
    offs = torch.tensor([1, 3], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match="weight_global_scale is of 5 experts, the weight of 2"):
        wush.fp4_grouped_linear(*x, None, *experts, torch.ones(5, device=device), offs, None, "mxfp4", torch.float32)


def test_a_mask_of_another_length_raises():
    with pytest.raises(IndexError, match="mask"):
        wush.observe(torch.randn(3, 64), torch.ones(4), *new_state(64))
