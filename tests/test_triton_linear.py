"""Triton's products against float64 of the same operands, on a GPU: every kernel, every optional operand, edge
cases."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from wush_compile import formats
from wush_compile.formats import FORMATS

pytest.importorskip("triton")
from wush_compile.kernels import facts
from wush_compile.kernels.triton.common import memory as triton_memory
from wush_compile.kernels.triton.linear import choose as triton_choose
from wush_compile.kernels.triton.linear import fp4_linear as triton_linear
from wush_compile.kernels.triton.linear import launch as triton_launch
from wush_compile.kernels.triton.linear import library as triton_library
from wush_compile.kernels.triton.linear.choose import Fused, Hopper
from wush_compile.kernels.triton.linear.operands import Operands, check

gpu = pytest.mark.gpu
DEVICE = "cuda"
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])


def scalar(g):
    return torch.tensor([g], device=DEVICE)


def operands(format, m, n, k, seed=0, octaves=4):
    """x with channels of very different size, w: codes and scales of both."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(m, k, device=DEVICE, generator=generator)
    x *= torch.exp(1.5 * torch.randn(k, device=DEVICE, generator=generator))
    w = 0.02 * torch.randn(n, k, device=DEVICE, generator=generator)
    w *= torch.exp2(octaves * torch.rand(n, k // 32, device=DEVICE, generator=generator)).repeat_interleave(32, 1)
    return *formats.quantize(x, format, "absmax"), *formats.quantize(w, format, "absmax")


def exact(codes, scales, w_codes, w_scales, format):
    x = formats.dequantize(codes, scales, format).double()
    return x @ formats.dequantize(w_codes, w_scales, format).double().T


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


KERNELS = {
    "mxfp4": [
        None,
        Fused(64, 16, 256, 1, 4, 4, True),
        Fused(64, 16, 128, 4, 4, 6, True),
        Fused(64, 16, 256, 2, 4, 4, False),
        Fused(64, 32, 256, 2, 4, 4, False),
        Fused(64, 64, 256, 2, 4, 3, True),
        Fused(128, 128, 128, 1, 8, 4, False),
        Fused(128, 256, 128, 1, 8, 3, False),
        Hopper(128, 16, 2, 4, 8),
        Hopper(128, 64, 2, 2, 8),
        Hopper(128, 128, 2, 4, 6),
        Hopper(128, 256, 2, 1, 4),
        Hopper(256, 128, 4, 1, 6),
        Hopper(256, 128, 4, 2, 6),
        Hopper(256, 32, 4, 1, 8),
        Hopper(128, 192, 2, 3, 6),
        "library",
        "bf16",
    ],
    "nvfp4": [
        None,
        Fused(64, 16, 128, 4, 4, 4, True),
        Fused(64, 16, 128, 1, 4, 4, False),
        Fused(64, 64, 128, 2, 4, 4, False),
        Fused(128, 128, 128, 2, 8, 3, False),
        Hopper(128, 16, 2, 4, 8),
        Hopper(128, 64, 2, 2, 7),
        Hopper(128, 128, 2, 4, 5),
        Hopper(128, 256, 2, 1, 3),
        Hopper(256, 128, 4, 1, 4),
        Hopper(256, 32, 4, 2, 7),
        Hopper(128, 192, 2, 3, 3),
        "bf16",
    ],
}
CASES = [(format, kernel) for format in KERNELS for kernel in KERNELS[format]]


@gpu
@pytest.mark.parametrize("format, kernel", CASES)
@pytest.mark.parametrize(
    "m, n, k",
    [
        (1, 200, 1024),
        (2, 128, 512),
        (4, 1000, 1024),
        (3, 72, 512),
        (17, 264, 1024),
        (70, 512, 2048),
        (300, 1040, 1024),
        (60, 264, 128),
        (33, 72, 256),
        (140, 512, 512),
    ],
)
def test_linear_is_the_exact_product(format, kernel, m, n, k):
    """fp32 output is within the accumulator's error of the float64 product; bf16 output adds one rounding. Also with
    every optional operand."""
    if isinstance(kernel, Fused) and k % (kernel.block_k * kernel.split_k):
        return
    c, s, wc, ws = operands(format, m, n, k)
    want = exact(c, s, wc, ws, format)
    if kernel != "library":
        got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.float32, kernel)
        assert error(got, want) < (5e-4 if format == "mxfp4" else 1e-5)
    rounding = error(want.bfloat16(), want)
    got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.bfloat16, kernel)
    assert error(got, want) < 1.05 * rounding + 1e-4
    gx, gw = scalar(0.37), scalar(3.0)
    bias, residual = torch.randn(n, device=DEVICE).bfloat16(), torch.randn(m, n, device=DEVICE).bfloat16()
    got = triton_linear.fp4_linear(c, s, gx, wc, ws, gw, bias, residual, format, torch.bfloat16, kernel)
    want = want / (0.37 * 3.0) + bias.double() + residual.double()
    assert error(got, want) < 4e-3


@pytest.mark.parametrize("multiprocessors", [1, 4, 7, 108, 114, 132])
def test_the_parts_of_a_tile_lie_in_one_round_of_programs(multiprocessors):
    """Then a program waits only for lower numbers, which a GPU places first."""
    for tiles, most in itertools.product(range(1, 300), (1, 2, 3, 4, 7, 8)):
        tail, split = triton_choose.split_tail(tiles, most, multiprocessors)
        whole, programs = tiles - tail, min(tiles + tail * (split - 1), multiprocessors)
        assert split <= most and (tail in (0, tiles % multiprocessors))
        for first in range(whole, whole + tail * split, split):
            assert first // programs == (first + split - 1) // programs, (tiles, most)


@gpu
@both
@pytest.mark.parametrize(
    "rows, multiprocessors, split, tail",
    [(64, 6, 3, 3), (64, 12, 4, 9), (64, 44, 2, 1), (64, 400, 8, 45), (64, 45, 5, 0), (192, 16, 2, 2)],
)
def test_tiles_behind_the_last_whole_wave_are_done_in_parts(format, rows, multiprocessors, split, tail, monkeypatch):
    """45 tiles, or 18 tiles of 128 + 64 rows of x, of 8 steps, which 3 parts do not divide. Every run gives the same
    bits."""
    tiles = 45 if rows == 64 else 18
    assert triton_choose.split_tail(tiles, split, multiprocessors) == (tail, split)
    c, s, wc, ws = operands(format, 300, 1040, 1024)
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda device: multiprocessors)
    tile = Hopper(128, rows, 2, split, 7 if rows == 64 else 3)
    got = [
        triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.float32, tile) for _ in range(3)
    ]
    assert error(got[0], exact(c, s, wc, ws, format)) < (5e-4 if format == "mxfp4" else 1e-5)
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    whole = triton_linear.fp4_linear(
        c, s, None, wc, ws, None, None, None, format, torch.float32, tile._replace(split_k=1)
    )
    same = (got[0] == whole).float().mean().item()
    assert same >= 1 - tail * 128 * rows / whole.numel()  # only the tail's sums have another order


def test_a_triton_whose_gluon_fails_is_told_once_and_replaced(monkeypatch, caplog):
    def broken(*args):
        raise AttributeError("no such layout")

    c, s = torch.zeros(300, 512, dtype=torch.uint8), torch.ones(300, 32, dtype=torch.uint8)
    wc, ws = torch.zeros(4096, 512, dtype=torch.uint8), torch.ones(4096, 32, dtype=torch.uint8)
    assert isinstance(triton_choose.choose("mxfp4", 300, 4096, 1024), Hopper)
    monkeypatch.setattr(triton_choose, "_failures", [])
    monkeypatch.setattr(triton_linear, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_linear, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_linear, "run_library", lambda operands: torch.full((300, 4096), 7.0))
    monkeypatch.setitem(triton_linear.RUN, Hopper, broken)
    with caplog.at_level("WARNING", "wush_compile"):
        for _ in range(2):
            y = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, "mxfp4", torch.bfloat16)
            assert (y == 7).all()  # the library's
        with pytest.raises(AttributeError):  # a kernel asked for by name raises its own error
            triton_linear.fp4_linear(
                c, s, None, wc, ws, None, None, None, "mxfp4", torch.bfloat16, Hopper(128, 64, 2, 1, 8)
            )
    triton_choose.choose.cache_clear()
    assert sum("no such layout" in record.getMessage() for record in caplog.records) == 1


@gpu
@both
@pytest.mark.parametrize("m", [1, 2, 4, 5])
@pytest.mark.parametrize("n, k", [(64, 32), (33, 576), (100, 1536), (16, 48)])
def test_linear_of_any_width(format, m, n, k):
    if k % FORMATS[format].group_size:
        return
    c, s = formats.quantize(torch.randn(m, k, device=DEVICE), format, "absmax")
    wc, ws = formats.quantize(torch.randn(n, k, device=DEVICE), format, "absmax")
    got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.float32)
    assert error(got, exact(c, s, wc, ws, format)) < 1e-5


@gpu
@pytest.mark.parametrize("m", [1, 9, 30, 64, 128, 300, 1100])
def test_precise_sums(m):
    """Outlier channels at K = 12288 show the fp8 accumulator's error. With `precise` only the fp32 sum's error is
    left."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(m, 12288, device=DEVICE, generator=generator)
    x *= torch.exp(1.5 * torch.randn(12288, device=DEVICE, generator=generator))
    w = 0.02 * torch.randn(512, 12288, device=DEVICE, generator=generator)
    q, v = formats.quantize(x, "mxfp4", "absmax"), formats.quantize(w, "mxfp4", "absmax")
    want = exact(*q, *v, "mxfp4")
    dtype = torch.bfloat16 if m > 512 else torch.float32
    got = [
        triton_linear.fp4_linear(*q, None, *v, None, None, None, "mxfp4", dtype, None, precise)
        for precise in (False, True)
    ]
    rounding = error(want.bfloat16(), want)
    if m > 512:
        assert error(got[1], want) < 1.0001 * rounding
    else:
        assert error(got[0], want) < 5e-4 and error(got[1], want) < 2e-5


@gpu
@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_every_code_and_sign(m):
    """Products of single codes are exact: column k of x meets column k of w alone."""
    k = 512
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(k // 16)
    x = torch.zeros(m, k, dtype=torch.uint8, device=DEVICE)
    x[:, 7] = torch.arange(m, device=DEVICE) % 16
    x[:, 300] = (torch.arange(m, device=DEVICE) // 16) % 16
    w = torch.stack([codes.roll(i) for i in range(64)])
    s = torch.full((m, k // 32), 127, dtype=torch.uint8, device=DEVICE)
    ws = torch.full((64, k // 32), 120, dtype=torch.uint8, device=DEVICE)
    x, w = formats.pack(x), formats.pack(w)
    got = triton_linear.fp4_linear(x, s, None, w, ws, None, None, None, "mxfp4", torch.float32)
    assert torch.equal(got.double(), exact(x, s, w, ws, "mxfp4"))


@gpu
@pytest.mark.parametrize("m", [1, 16, 64, 200, 1100])
def test_far_apart_scales(m):
    """Bytes 1 and 254 in one row, a row 2^20 above the others, weights 20 octaves apart: no inf, no NaN, and every row
    within 2^-20 of what its largest products are worth."""
    c, s, wc, ws = operands("mxfp4", m, 256, 1024)
    s = s.clone()
    s[0] += 20
    if m > 1:
        s[1, 5], s[1, 6] = 1, 160
    ws = ws.clone()
    ws[3, 7] -= 20
    ws[4, 0] = 1
    want = exact(c, s, wc, ws, "mxfp4")
    got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, "mxfp4", torch.float32)
    assert torch.isfinite(got).all()
    x, w = formats.dequantize(c, s, "mxfp4").double().abs(), formats.dequantize(wc, ws, "mxfp4").double().abs()
    assert ((got.double() - want).abs() <= (x @ w.T) * 2.0**-11 + x.amax(1)[:, None] * w.sum(1) * 2.0**-20).all()


@gpu
@both
@pytest.mark.parametrize("m", [1, 5, 64, 200, 1100])
def test_not_finite_rows_stay_in_their_rows(format, m):
    c, s, wc, ws = operands(format, m, 128, 1024)
    mark = 0xFF if format == "mxfp4" else 0x7F
    s, ws = s.clone(), ws.clone()
    s[m - 1, 3], ws[100, 9] = mark, mark
    got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.bfloat16)
    bad = torch.zeros(m, 128, dtype=torch.bool, device=DEVICE)
    bad[m - 1], bad[:, 100] = True, True
    assert torch.equal(got.isnan(), bad)


@gpu
def test_weights_outside_e4m3_take_another_kernel():
    """Large batches compute in e4m3, which holds 15 octaves. A weight with more octaves is exact too."""
    c, s, wc, ws = operands("mxfp4", 1100, 256, 1024, octaves=0)
    ws = ws.clone()
    ws[:, ::2] -= 18
    s[:, 1::2] -= 18
    assert not triton_memory.row_facts(ws).fits_e4m3
    got = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, "mxfp4", torch.bfloat16)
    want = exact(c, s, wc, ws, "mxfp4")
    assert error(got, want) < 1.05 * error(want.bfloat16(), want) + 1e-4


@gpu
def test_row_facts_follow_the_weight():
    _, _, _, ws = operands("mxfp4", 1, 64, 512, octaves=0)
    first = triton_memory.row_facts(ws)
    assert triton_memory.row_facts(ws) is first and triton_memory.row_facts(ws[32:]) is not first
    ws[3, 4] += 9
    assert torch.equal(triton_memory.row_facts(ws).top, ws.amax(-1))


@gpu
def test_split_sums_are_reproducible():
    c, s, wc, ws = operands("mxfp4", 16, 512, 4096)
    kernel = Fused(64, 16, 256, 4, 4, 4, True)
    runs = [
        triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, "mxfp4", torch.float32, kernel)
        for _ in range(20)
    ]
    assert all(torch.equal(r, runs[0]) for r in runs)


@gpu
@both
@pytest.mark.parametrize("m", [1, 16, 128, 1100])
def test_linear_in_a_cuda_graph(format, m):
    c, s, wc, ws = operands(format, m, 256, 1024)
    call = lambda: triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.bfloat16)  # noqa: E731
    want = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


def test_a_weight_is_settled_from_its_second_use_until_it_is_written():
    w = torch.zeros(8, 64, dtype=torch.uint8)
    assert (
        not facts.mark_used_and_were_settled(w)
        and facts.mark_used_and_were_settled(w)
        and facts.mark_used_and_were_settled(w.view(8, 64))
    )
    assert not facts.mark_used_and_were_settled(w[4:]) and facts.mark_used_and_were_settled(w[4:])
    w[0] = 3
    assert (
        not facts.mark_used_and_were_settled(w[4:])
        and not facts.mark_used_and_were_settled(w)
        and facts.mark_used_and_were_settled(w)
    )


@both
def test_weights_are_read_early_only_if_they_were_there_before(format, monkeypatch):
    """`hopper` prefetches from a weight's second use on. The largest scales must have been there too: a capture may
    have just made them."""
    from wush_compile.kernels.triton.linear import hopper as triton_hopper

    seen = []

    class Kernel:
        arg_names = triton_hopper.hopper_gemm_kernel.arg_names

        def __getitem__(self, grid):
            return lambda *args, **options: seen.append(args[self.arg_names.index("prefetch")])

    monkeypatch.setattr(triton_hopper, "hopper_gemm_kernel", Kernel())
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_launch, "upcast_x", lambda o: (torch.zeros(64, 512, dtype=torch.bfloat16), None, None))
    mx = format == "mxfp4"
    codes, w_codes = (torch.zeros(n, 256, dtype=torch.uint8) for n in (64, 128))
    scales, w_scales = (torch.ones(n, 16 if mx else 32, dtype=torch.uint8) for n in (64, 128))
    o = Operands(codes, scales, None, w_codes, w_scales, None, None, None, format)
    out = torch.empty(64, 128, dtype=torch.bfloat16)

    def early():
        triton_launch.run_hopper(o, Hopper(128, 64, 2, 1, 7), out)
        return seen.pop()

    assert [early(), early(), early()] == [0, 1, 1]
    w_scales[0] = 3
    assert [early(), early()] == [0, 1]
    w_codes[0] = 3
    assert [early(), early()] == [0, 1]
    w_scales[0] = 4
    monkeypatch.setattr(facts, "capturing", lambda t: True)
    assert [early(), early()] == ([0, 0] if mx else [0, 1])


def test_powers_of_two_are_known():
    g = torch.tensor([0.25])
    assert triton_memory.is_power_of_two(None) and triton_memory.is_power_of_two(g)
    g.fill_(10)
    assert not triton_memory.is_power_of_two(g)
    assert not any(
        triton_memory.is_power_of_two(torch.tensor([v])) for v in (0.0, -2.0, 3.0, float("nan"), float("inf"))
    )


@pytest.mark.parametrize("n, k", [(16, 4096), (256, 64), (28672, 4096), (4096, 14336), (10**6, 2**20)])
def test_parts_cover_the_weight(n, k):
    parts = triton_library.weight_slices(n, k)
    assert [i for p in parts for i in (p.start, p.stop)][1:-1:2] == [p.start for p in parts[1:]]
    assert parts[0].start == 0 and parts[-1].stop == n
    assert all((p.stop - p.start) * k <= triton_library.SCRATCH_BYTES or p.stop - p.start <= 256 for p in parts)


def test_precise_is_an_environment_variable(monkeypatch):
    for value, expected in ((None, False), ("0", False), ("", False), ("1", True)):
        monkeypatch.delenv("WUSH_PRECISE", raising=False)
        if value is not None:
            monkeypatch.setenv("WUSH_PRECISE", value)
        assert triton_choose.precise_by_default() is expected
    assert triton_choose.choose("mxfp4", 128, 4096, 4096, precise=True).block_k == 256
    assert triton_choose.choose("mxfp4", 4096, 4096, 4096, precise=True) == "library"


@both
def test_wrong_operands_are_errors(format):
    """An operand whose shape, dtype or device would make a kernel read other memory or misread values is an error."""
    fmt = FORMATS[format]
    good = dict(
        codes=torch.zeros(3, 64, dtype=torch.uint8),
        scales=torch.ones(3, 128 // fmt.group_size, dtype=torch.uint8),
        global_scale=None,
        weight_codes=torch.zeros(8, 64, dtype=torch.uint8),
        weight_scales=torch.ones(8, 128 // fmt.group_size, dtype=torch.uint8),
        weight_global_scale=torch.ones(1),
        bias=torch.ones(8),
        residual=torch.ones(3, 8, dtype=torch.bfloat16),
        format=format,
    )
    check(Operands(**good), torch.bfloat16)
    for name, bad, message in (
        ("scales", good["scales"][:2], "scales has shape"),
        ("weight_scales", good["weight_scales"][:, :-1], "weight_scales has"),
        ("weight_codes", good["weight_codes"][:, :-2], "weight_codes has shape"),
        ("bias", torch.ones(7), "bias has shape"),
        ("weight_scales", good["weight_scales"].float(), "weight_scales is torch.float32"),
        ("weight_global_scale", torch.ones(2), "has shape"),
        ("residual", torch.ones(3, 8), "residual is torch.float32"),
        ("bias", torch.ones(8, device="meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            check(Operands(**good | {name: bad}), torch.bfloat16)


@gpu
@pytest.mark.parametrize("g", [0.25, 10.0, None])
def test_global_scales_of_the_library(g):
    """A global scale that is a power of two goes into the operands, another one is applied after the sum. Both round
    once."""
    c, s, wc, ws = operands("nvfp4", 300, 512, 1024)
    g = None if g is None else scalar(g)
    residual = torch.randn(300, 512, device=DEVICE).bfloat16()
    got = triton_linear.fp4_linear(c, s, g, wc, ws, g, None, residual, "nvfp4", torch.bfloat16, "bf16")
    want = exact(c, s, wc, ws, "nvfp4") / (1 if g is None else g.item() ** 2)
    plain = triton_linear.fp4_linear(c, s, g, wc, ws, g, None, None, "nvfp4", torch.bfloat16, "bf16")
    assert error(plain, want) < 1.01 * error(want.bfloat16(), want)
    assert torch.equal(got, plain + residual)


@gpu
@both
@pytest.mark.parametrize("m, n, k", [(1024, 282, 3008), (3111, 78, 1952), (16, 282, 3008)])
@pytest.mark.parametrize("activation", ["same", "none"])
def test_the_library_rounds_once_where_it_splits_sums(format, m, n, k, activation):
    """cuBLAS would round the parts of a sum to bf16. Its settings stay those of the process."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    c, s, wc, ws = operands(format, m, n, k)
    if activation == "none":
        c, s = formats.dequantize(c, s, format).bfloat16(), s.new_empty((m, 0), dtype=torch.float32)
        want = c.double() @ formats.dequantize(wc, ws, format).double().T
    else:
        want = exact(c, s, wc, ws, format)
    call = c, s, None, wc, ws, None, None, None, format, torch.bfloat16, "bf16"
    got = triton_linear.fp4_linear(*call, activation_format=activation)
    assert error(got, want) < 1.01 * error(want.bfloat16(), want)
    assert before == (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction)


@gpu
@both
def test_strides_do_not_matter(format):
    c, s, wc, ws = operands(format, 6, 128, 512)
    want = triton_linear.fp4_linear(c, s, None, wc, ws, None, None, None, format, torch.bfloat16)
    residual = torch.randn(128, 6, device=DEVICE).bfloat16()
    loose = [torch.stack((t, t), -1)[..., 0] for t in (c, s, wc, ws)]
    got = triton_linear.fp4_linear(*loose[:2], None, *loose[2:], None, None, residual.T, format, torch.bfloat16)
    assert torch.equal(got, want + residual.T)


# -- int4 ------------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("m, n, k", [(1, 200, 1024), (17, 264, 96), (70, 512, 2048), (300, 1040, 576)])
@pytest.mark.parametrize("rule", ["mse", "gaussian"])
def test_int4(m, n, k, rule):
    x, w = torch.randn(m, k, device=DEVICE), torch.randn(n, k, device=DEVICE)
    x[:, 32:64] = 0
    q, v = formats.quantize(x, "int4", rule), formats.quantize(w, "int4", rule)
    got = triton_linear.fp4_linear(*q, None, *v, None, None, None, "int4", torch.float32)
    assert error(got, exact(*q, *v, "int4")) < 1e-6
    bias, residual = torch.randn(n, device=DEVICE).bfloat16(), torch.randn(m, n, device=DEVICE).bfloat16()
    got = triton_linear.fp4_linear(*q, None, *v, None, bias, residual, "int4", torch.bfloat16)
    assert error(got, exact(*q, *v, "int4") + bias.double() + residual.double()) < 4e-3
    q[1][m - 1, 2] = float("nan")
    got = triton_linear.fp4_linear(*q, None, *v, None, None, None, "int4", torch.bfloat16)
    assert got[m - 1].isnan().all() and not got[: m - 1].isnan().any()


INTERPRETED = """
import torch
from wush_compile import formats
from wush_compile.ops.core import REFERENCE
from wush_compile.kernels.triton.linear.int4 import int4_gemm_kernel
torch.manual_seed(0)
for m, n, k in ((3, 70, 96), (17, 64, 64)):
    q, v = formats.quantize(torch.randn(m, k), "int4", "mse"), formats.quantize(torch.randn(n, k), "int4", "gaussian")
    q[1][0, 1], q[1][1, 0] = float("nan"), 0
    bias, out = torch.randn(n), torch.empty(m, n)
    grid = (-(-m // 16) * -(-n // 64),)
    int4_gemm_kernel[grid](*q, None, *v, None, bias, None, out, m, n, k, False, False, True, False, 64, 16, 2, False)
    want = REFERENCE["fp4_linear"](*q, None, *v, None, bias, None, "int4", torch.float32)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4, equal_nan=True)
print("same")
"""


def test_int4_interpreted():
    """The same kernel under Triton's interpreter, without a GPU. In a process of its own, because Triton reads
    TRITON_INTERPRET at import."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


EXPANDED = """
import torch, triton
import triton.language as tl
from wush_compile import formats
from wush_compile.kernels.triton.linear import upcast

@triton.jit
def look_up(w, low, high):
    first = tl.zeros_like(w)
    second = tl.zeros_like(w)
    for i in tl.static_range(8):
        code = (w >> (4 * i)) & 15
        m = code & 7
        byte = tl.where(m < 4, (low >> (8 * (m & 3))) & 255, (high >> (8 * (m & 3))) & 255) | ((code >> 3) << 7)
        if i < 4:
            first = first | (byte << (8 * i))
        else:
            second = second | (byte << (8 * (i - 4)))
    return first, second

upcast._look_up = look_up                       # the interpreter knows no assembly
torch.manual_seed(0)
for m, n, k in ((3, 5, 256), (2, 7, 576)):
    octaves = torch.randint(-4, 4, (m, k // 32)).float().repeat_interleave(32, 1)
    q = formats.quantize(torch.randn(m, k) * torch.exp2(octaves), "mxfp4", "absmax")
    v = formats.quantize(torch.randn(n, k), "mxfp4", "absmax")
    x, w = torch.zeros(m, k, dtype=torch.float8_e5m2), torch.zeros(n, k, dtype=torch.float8_e4m3fn)
    x_unit, w_unit, g = torch.zeros(m), torch.zeros(n), torch.tensor([4.0])
    words, groups = [t.view(torch.int32) for t in (q[0], x, v[0], w)], triton.next_power_of_2(k // 32)
    both = (words[0], q[1], g, x_unit, words[1], words[2], v[1], None, w_unit, words[3])
    upcast.upcast_both_kernel[(m + n,)](*both, m, k, groups, True, False, groups, False)
    order = torch.cat([c[h] for c in torch.arange(k).split(128) for h in (c % 8 < 4, c % 8 >= 4)])
    for out, unit, packed, scale in ((x, x_unit, q, g), (w, w_unit, v, None)):
        want = formats.dequantize(*packed, "mxfp4", scale)[:, order]
        assert torch.equal(out.float() * unit[:, None], want), (m, n, k)
print("same")
"""


def test_upcasts_interpreted(tmp_path):
    """Both operands of the library's product are exact, with their channels in the same order."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "expanded.py"  # Triton reads a kernel's source from its file
    script.write_text(EXPANDED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]
