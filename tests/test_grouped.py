"""`wush::fp4_grouped_linear` on a CPU: schema, fake, the reference against `fp4_linear`, and what it refuses."""

import pytest
import torch
from torch.library import opcheck

from wush_compile import formats
from wush_compile.errors import OffsetsError
from wush_compile.formats import FORMATS
from wush_compile.ops.layouts import lay_out

wush = torch.ops.wush
all_formats = pytest.mark.parametrize("format", FORMATS)
# Rows of each of four experts, and rows of none.
SPLITS = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 3, 0), (3, 1, 17, 8, 0), (0, 129, 0, 1, 2), (0, 0, 0, 0, 5)]


def offsets(counts):
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def operands(rows, format, k=64, n=5, experts=4):
    """(codes, scales, gx, weight codes, weight scales, gw)."""
    x = formats.quantize(torch.randn(rows, k), format, "absmax")
    w = formats.quantize(torch.randn(experts, n, k), format, "absmax")
    gx, gw = (torch.tensor([3.0]), torch.arange(1.0, experts + 1)) if format == "nvfp4" else (None, None)
    return *x, gx, *w, gw


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@all_formats
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(format, with_bias):
    bias = torch.randn(4, 5).bfloat16() if with_bias else None
    args = (*operands(9, format), offsets([2, 0, 3, 4]), bias, format, torch.bfloat16)
    opcheck(wush.fp4_grouped_linear.default, args)


@all_formats
@pytest.mark.parametrize("split", SPLITS)
def test_each_expert_is_a_linear(format, split):
    *counts, beyond = split
    x, xs, gx, w, ws, gw = operands(sum(split), format)
    bias = torch.randn(4, 5)
    got = wush.fp4_grouped_linear(x, xs, gx, w, ws, gw, offsets(counts), bias, format, torch.float32)
    want, start = [], 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        g = None if gw is None else gw[e : e + 1]
        want.append(wush.fp4_linear(x[rows], xs[rows], gx, w[e], ws[e], g, bias[e], None, format, torch.float32))
        start += count
    want.append(torch.zeros(beyond, 5))
    assert torch.equal(got, torch.cat(want))
    fake = wush.fp4_grouped_linear(
        *(None if t is None else t.to("meta") for t in (x, xs, gx, w, ws, gw, offsets(counts), bias)),
        format,
        torch.float32,
    )
    assert fake.shape == got.shape and fake.dtype == got.dtype


@pytest.mark.parametrize("activation, rule", [("fp8", "token"), ("none", "none")])
def test_activations_of_8_and_16_bits(activation, rule):
    _, _, _, w, ws, _ = operands(0, "mxfp4")
    x, xs = wush.transform_quantize(torch.randn(7, 64).bfloat16(), None, None, activation, rule)
    rest = ("mxfp4", torch.float32, "rows", activation)
    got = wush.fp4_grouped_linear(x, xs, None, w, ws, None, offsets([4, 0, 0, 3]), None, *rest)
    for rows, e in ((slice(0, 4), 0), (slice(4, 7), 3)):
        want = wush.fp4_linear(x[rows], xs[rows], None, w[e], ws[e], None, None, None, *rest)
        assert torch.equal(got[rows], want)  # of the same kernels, or of the reference


def test_swizzled_scales():
    x, xs, _, w, ws, _ = operands(140, "mxfp4")
    rest = (None, w, ws, None, offsets([100, 20, 0, 20]), None, "mxfp4", torch.float32)
    got = wush.fp4_grouped_linear(x, lay_out(xs, "swizzled"), *rest, "swizzled")
    assert torch.equal(got, wush.fp4_grouped_linear(x, xs, *rest))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_by_index(dtype):
    x, xs, gx, w, ws, gw = operands(5, "nvfp4")
    index, rest = torch.tensor([4, 0, 0, 3, 1, 4], dtype=dtype), (offsets([2, 0, 3, 1]), None, "nvfp4", torch.float32)
    opcheck(wush.fp4_grouped_linear.default, (x, xs, gx, w, ws, gw, *rest, "rows", "same", index))
    got = wush.fp4_grouped_linear(x, xs, gx, w, ws, gw, *rest, index=index)
    assert torch.equal(got, wush.fp4_grouped_linear(x[index], xs[index], gx, w, ws, gw, *rest))
    for bad in (index + 1, index - 1):
        with pytest.raises(OffsetsError, match="index"):
            wush.fp4_grouped_linear(x, xs, gx, w, ws, gw, *rest, index=bad)


@pytest.mark.parametrize("offs", [[3, 2, 5, 9], [-1, 0, 0, 9], [0, 0, 0, 10]])
def test_bad_offsets_are_errors(offs):
    args = operands(9, "mxfp4")
    with pytest.raises(OffsetsError, match="running sums"):
        wush.fp4_grouped_linear(*args, torch.tensor(offs, dtype=torch.int32), None, "mxfp4", torch.float32)


@pytest.mark.parametrize(
    "name, bad",
    [
        ("offs", torch.zeros(3, dtype=torch.int32)),
        ("offs", torch.zeros(4, dtype=torch.int64)),
        ("weight_scales", torch.ones(3, 5, 2, dtype=torch.uint8)),
        ("weight_codes", torch.ones(5, 32, dtype=torch.uint8)),
        ("codes", torch.ones(3, 3, 32, dtype=torch.uint8)),
        ("codes", torch.ones(9, 16, dtype=torch.uint8)),
        ("bias", torch.ones(4, 4)),
        ("bias", torch.ones(3, 5)),
    ],
)
def test_wrong_shapes_are_errors_on_real_and_on_fake_tensors(name, bad):
    names = ("codes", "scales", "global_scale", "weight_codes", "weight_scales", "weight_global_scale")
    good = dict(zip(names, operands(9, "mxfp4"))) | {"offs": offsets([2, 0, 3, 4]), "bias": torch.randn(4, 5)}
    args = good | {name: bad}
    for place in ("cpu", "meta"):
        moved = [None if t is None else t.to(place) for t in args.values()]
        with pytest.raises((RuntimeError, ValueError)):
            wush.fp4_grouped_linear(*moved, "mxfp4", torch.float32)
