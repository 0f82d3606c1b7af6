"""Triton's products of experts' rows: on a GPU against float64 of the same operands; the rest interpreted, and as
machine code."""

import json
import os
import pathlib
import re
import subprocess
import sys
from math import inf

import pytest
import torch
from helpers import skip_where_triton_interprets_no_loops
from test_lowering import compile_kernel, main_loops, nothing_runs_on, overwritten_too_early, sass

from wush_compile import formats

triton = pytest.importorskip("triton")
from wush_compile.kernels.triton.grouped import fp4_grouped_linear as grouped
from wush_compile.kernels.triton.grouped import upcast
from wush_compile.kernels.triton.grouped.choose import GEMM, HOPPER, REGISTERS, Gemm, Hopper, choose
from wush_compile.kernels.triton.grouped.find import most_tiles
from wush_compile.kernels.triton.grouped.gemm import grouped_gemm_kernel
from wush_compile.kernels.triton.grouped.gemv import grouped_gemv_kernel
from wush_compile.kernels.triton.grouped.scaled import grouped_scaled_kernel
from wush_compile.kernels.triton.linear.choose import Gemv, Scaled
from wush_compile.kernels.triton.linear.upcast import upcast_fp8

gpu = pytest.mark.gpu
DEVICE = "cuda"
ROOT = pathlib.Path(__file__).parent.parent
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
# Rows of each of five experts, and rows of none.
SPLITS = [(0, 0, 3, 0, 0, 0), (1, 0, 2, 1, 0, 0), (17, 0, 129, 1, 3, 0), (0, 300, 0, 0, 70, 9), (0, 0, 0, 0, 0, 5)]
TILES = [
    None,
    Gemv(8, 2048, 4),
    Gemm(64, 16, 256, 4, 3),
    Gemm(64, 32, 128, 4, 4),
    Gemm(64, 64, 128, 4, 3),
    Gemm(128, 64, 128, 8, 3),
    Hopper(128, 16, 5, 3),
    Hopper(128, 16, 8, 2),
    Hopper(128, 32, 6, 2),
    Hopper(128, 64, 4, 2),
    Hopper(128, 128, 4, 1),
    Hopper(128, 256, 3, 1),
]
SHAPES = {"mxfp4": [(264, 512), (200, 416)], "nvfp4": [(200, 416)]}  # (N, K); 416 fills no step


def offsets(counts, device="cpu"):
    return torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)


def operands(format, tokens, experts, n, k, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(tokens, k, device=DEVICE, generator=generator)
    w = 0.02 * torch.randn(experts, n, k, device=DEVICE, generator=generator)
    w *= torch.exp2(4 * torch.rand(experts, n, k // 32, device=DEVICE, generator=generator)).repeat_interleave(32, 2)
    return *formats.quantize(x, format, "absmax"), *formats.quantize(w, format, "absmax")


def exact(x, w, counts, bias=None):
    """x [S, K], w [E, N, K], both float64."""
    out, start = torch.zeros(x.shape[0], w.shape[1], dtype=torch.float64, device=x.device), 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        out[rows] = x[rows] @ w[e].T + (0 if bias is None else bias[e].double())
        start += count
    return out


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def wide(codes, scales, format):
    return formats.dequantize(codes, scales, format).double()


@gpu
@pytest.mark.parametrize("format, n, k", [(format, *shape) for format in SHAPES for shape in SHAPES[format]])
@pytest.mark.parametrize("kernel", TILES, ids=str)
def test_products_of_every_split(kernel, format, n, k):
    """Rows by an index, experts without rows, rows without an expert, N and K that fill no tile; biases and scales."""
    for *counts, beyond in SPLITS:
        rows = sum(counts) + beyond
        c, s, w, ws = operands(format, 40, 5, n, k, seed=rows)
        index = torch.randint(0, 40, (rows,), device=DEVICE)
        offs, bias = offsets(counts, DEVICE), torch.randn(5, n, device=DEVICE).bfloat16()
        g, gw = (None, None) if format == "mxfp4" else (torch.full((1,), 3.0), torch.arange(1.0, 6.0))
        g, gw = (t if t is None else t.to(DEVICE) for t in (g, gw))
        call = lambda c, s, index: grouped.fp4_grouped_linear(  # noqa: E731
            c, s, g, w, ws, gw, offs, bias, format, torch.float32, "same", index, kernel
        )
        x, wide_w = wide(c, s, format)[index], wide(w, ws, format)
        if gw is not None:
            x, wide_w = x / 3, wide_w / gw[:, None, None].double()
        got, want = call(c, s, index), exact(x, wide_w, counts, bias)
        assert relative(got, want) < 5e-4, (counts, relative(got, want))
        assert not got[rows - beyond :].any()
    assert torch.equal(call(c[index], s[index], None), got) and torch.equal(call(c, s, index.int()), got)


@gpu
@pytest.mark.parametrize("rows, k, scaled", [(4096, 2048, False), (4099, 416, True), (5001, 2880, False)])
def test_many_rows_are_expanded_as_few_are(rows, k, scaled):
    """Rows that fill no program, widths that fill no panel, an index past the tokens; bit for bit."""
    codes = torch.randint(0, 256, (300, k // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.randint(90, 127, (300, k // 32), dtype=torch.uint8, device=DEVICE)
    g, index = torch.full((1,), 3.0, device=DEVICE) if scaled else None, torch.randint(-5, 310, (rows,), device=DEVICE)
    for some in (index, index.int(), None):
        got = upcast.upcast_many(codes, scales, g, some)
        want = upcast_fp8(codes, scales, g, e4m3=False, lane_order=True, index=some)
        assert torch.equal(got[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(got[1], want[1])


@gpu
@both
@pytest.mark.parametrize("activation, rule", [("fp8", "token"), ("none", "none")])
@pytest.mark.parametrize("kernel", [None, TILES[4], TILES[9]], ids=str)
def test_activations_of_8_and_16_bits(format, activation, rule, kernel):
    counts = [3, 0, 20, 0, 1]
    _, _, w, ws = operands(format, 1, 5, 136, 416)
    x = torch.randn(30, 416, device=DEVICE).bfloat16()
    c, s = torch.ops.wush.transform_quantize(x, None, None, activation, rule)
    index = torch.randint(0, 30, (24,), device=DEVICE)
    x = formats.dequantize_fp8(c, s).double() if activation == "fp8" else c.double()
    got = grouped.fp4_grouped_linear(
        c, s, None, w, ws, None, offsets(counts, DEVICE), None, format, torch.float32, activation, index, kernel
    )
    assert relative(got, exact(x[index], wide(w, ws, format), counts)) < 5e-4


@gpu
@both
@pytest.mark.parametrize("rows, tokens", [(8, 1), (64, 8), (3000, 375)])
def test_in_a_cuda_graph_with_another_split(format, rows, tokens):
    """The graph is captured with one split of the rows and replayed with others; the host never waits."""
    c, s, w, ws = operands(format, tokens, 16, 256, 512)
    offs, index = torch.zeros(16, dtype=torch.int32, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    call = lambda: torch.ops.wush.fp4_grouped_linear(  # noqa: E731
        c, s, None, w, ws, None, offs, None, format, torch.bfloat16, index=index
    )
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.bincount(torch.randint(0, 16, (rows,), generator=generator), minlength=16).tolist()
        offs.copy_(offsets(counts))
        index.copy_(torch.randint(0, tokens, (rows,), generator=generator))
        got.fill_(7)
        graph.replay()
        want = exact(wide(c, s, format)[index], wide(w, ws, format), counts)
        assert relative(got, want) < 2.2e-3


@gpu
@pytest.mark.parametrize("kernel", TILES[1:], ids=str)
def test_offsets_that_are_wrong_read_nothing_outside(kernel):
    """What such offsets give is undefined; a read or a write outside would be a fault."""
    c, s, w, ws = operands("mxfp4", 50, 5, 200, 416)
    index, bias = torch.full((90,), 2**40, device=DEVICE), torch.randn(5, 200, device=DEVICE).bfloat16()
    for bad in ([30, 10, 90, 40, 90], [-5, 20, 2**30, 2**31 - 1, 90], [2**31 - 1, -(2**31), 0, 60, 20], [95] * 5):
        offs = torch.tensor(bad, dtype=torch.int32, device=DEVICE)
        grouped.fp4_grouped_linear(c, s, None, w, ws, None, offs, bias, "mxfp4", torch.float32, "same", index, kernel)
    torch.cuda.synchronize()


@gpu
def test_precise_sums():
    """Sums that go to fp32 every 128 channels lose no more than fp32 does."""
    counts = [200, 0, 100]
    c, s, w, ws = operands("mxfp4", 300, 3, 136, 2048)
    args = (c, s, None, w, ws, None, offsets(counts, DEVICE), None, "mxfp4", torch.float32)
    want = exact(wide(c, s, "mxfp4"), wide(w, ws, "mxfp4"), counts)
    assert relative(grouped.fp4_grouped_linear(*args, precise=True), want) < 2e-5


@gpu
@both
def test_a_bad_weight_stays_in_its_expert(format):
    for counts in ([2, 1, 2], [40, 30, 20], [300, 200, 100]):
        c, s, w, ws = operands(format, sum(counts), 3, 136, 512)
        ws = ws.clone()
        ws[1, 7, 3] = 0xFF if format == "mxfp4" else 0x7F
        got = torch.ops.wush.fp4_grouped_linear(
            c, s, None, w, ws, None, offsets(counts, DEVICE), None, format, torch.bfloat16
        )
        bad = torch.zeros_like(got, dtype=torch.bool)
        bad[counts[0] : counts[0] + counts[1], 7] = True
        assert torch.equal(got.isnan(), bad)


@pytest.mark.parametrize(
    "rows, experts, block", [(0, 4, 16), (1, 4, 16), (8, 128, 16), (700, 128, 64), (131072, 8, 128)]
)
def test_no_split_needs_more_tiles(rows, experts, block):
    worst = 0
    for used in range(min(rows, experts + 1) + 1):  # the worst split of so many groups: all but one have a single row
        worst = max(worst, max(used - 1, 0) + -(-(rows - max(used - 1, 0)) // block) if used else 0)
    assert worst <= most_tiles(rows, experts, block) <= worst + (experts + 1)


INTERPRETED = """
import torch, triton
import triton.language as tl
from wush_compile import formats
from wush_compile.ops.grouped import GROUPED_REFERENCE
from wush_compile.kernels.triton.grouped import find, gemm, gemv
from wush_compile.kernels.triton.linear import gemv as linear_gemv

@triton.jit
def value(code):
    c = code & 7
    double = c + tl.maximum(c - 4, 0) + tl.maximum(c - 6, 0) * 2
    return tl.where((code & 8) != 0, -double, double).to(tl.float32) * 0.5

@triton.jit
def decode(w, words, picks, top, FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    e = ((words >> (8 * (picks & 7))) & 255) - top[:, None]
    factor = tl.exp2(tl.maximum(e, -26).to(tl.float32) + 13)
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], (ROWS, BLOCK_K // 32, 16)), (ROWS, BLOCK_K // 2))
    return value(w.to(tl.int32) & 15) * factor, value(w.to(tl.int32) >> 4) * factor

@triton.jit
def weight_bytes(w):
    return w, w, w, w

@triton.jit
def activation_bytes(x):
    return x, x

@triton.jit
def dot8(p0, n0, p1, n1, x0, x1):
    total = (p0 * 0).to(tl.float32)
    for i in tl.static_range(8):
        total += value((p0 >> (4 * i)) & 15) * value((x0 >> (4 * i)) & 15) * 4
    return total

gemm.decode = decode
linear_gemv._activation_bytes, linear_gemv._dot8, gemv.weight_bytes = activation_bytes, dot8, weight_bytes

@triton.jit
def as_it_is(acc):
    return acc

gemm.wait_for = as_it_is
torch.manual_seed(0)
selectors = torch.arange(0x4440, 0x4444, dtype=torch.int32)
E, n = 3, 20
for k, splits in ((160, [(5, 0, 18, 2)]), (128, [(0, 3, 0, 0)])):
    for *counts, beyond in splits:
        S = sum(counts) + beyond
        T = 9
        q = formats.quantize(torch.randn(T, k), "mxfp4", "absmax")
        w = formats.quantize(torch.randn(E, n, k), "mxfp4", "absmax")
        index = torch.randint(0, T, (S,))
        offs, bias = torch.tensor(counts).cumsum(0, dtype=torch.int32), torch.randn(E, n)
        want = GROUPED_REFERENCE["fp4_grouped_linear"](
            *q, None, *w, None, offs, bias, "mxfp4", torch.float32, index=index
        )
        x = torch.nn.functional.pad(formats.dequantize(*q, "mxfp4")[index], (0, -k % 128))
        x = x.view(S, -1, 64, 2).transpose(2, 3).reshape(S, -1).contiguous()
        words = torch.nn.functional.pad(w[1], (0, -(k // 32) % 4)).view(torch.int32)
        for block_m in (16,) if k == 160 else (4,):
            out = torch.full((S, n), 7.0)
            grid = (find.most_tiles(S, E, block_m) * -(-n // 16),)
            gemm.grouped_gemm_kernel[grid](
                x, None, None, w[0], words, w[1].amax(-1), None, offs, bias, selectors, out, S,
                n, k, E, 4, "mxfp4", False, False, True, 16, block_m, 128, 2, 0, False,
            )
            torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
            table = torch.full((find.most_tiles(S, E, block_m) + 2, 4), 9, dtype=torch.int32)
            find.tile_table_kernel[(2,)](offs, table, out, S, table.shape[0], n, E, 4, block_m, 16, False)
            tiles, start = [], 0
            for e, count in enumerate(counts):
                tiles += [[e, first, start + count] for first in range(start, start + count, block_m)]
                start += count
            assert table[: len(tiles), :3].tolist() == tiles and (table[len(tiles) :, 0] == -1).all()
            assert not out[start:].any() and torch.equal(out[:start] == 0, want[:start] == 0)
        out = torch.full((S, n), 7.0)
        gemv.grouped_gemv_kernel[(1, S)](
            q[0].view(torch.int32), q[1], None, index, w[0].view(torch.int32), w[1], None, offs, bias, out, T,
            n, k, E, 4, "mxfp4", False, False, True, 32, 128, False,
        )
        torch.testing.assert_close(out, want, rtol=0, atol=2e-5)
print("same")
"""


def test_interpreted(tmp_path):
    """The kernels' own code but for what is written in assembly: experts, tails of K and N, rows of none, an index."""
    skip_where_triton_interprets_no_loops()
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = tmp_path / "grouped.py"  # Triton reads a kernel's source from its file
    script.write_text(INTERPRETED)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env)
    assert run.stdout.strip().endswith("same"), run.stderr[-2000:]


# -- machine code ----------------------------------------------------------------------------------------------------


PLAIN = dict.fromkeys(("gx", "gw", "bias", "x_unit", "w_top", "index", "residual", "partials"))
PLAIN |= dict(SCALED_X=False, SCALED_W=False, BIAS=False)


def compile_grouped(format, kernel, cc, experts=128, n=1536, k=2048):
    """A product as launched; format: also mxfp4_bf16."""
    mx, tops = format == "mxfp4", format != "nvfp4"
    sizes = dict(PLAIN, N=n, K=k, E=experts, EXPERTS=triton.next_power_of_2(experts), FORMAT=format)
    common = dict(w="*u8", offs="*i32", out="*bf16", S="i32", T="i32")
    if isinstance(kernel, Scaled):
        scale = "*u8" if mx else "*fp8e4nv"
        pointers = common | dict(x="*u8", x_scales=scale, w_scales=scale, index="*i64")
        tile = dict(BLOCK_M=kernel.block_m, BLOCK_N=kernel.block_n, BLOCK_K=kernel.block_k, STAGES=kernel.stages)
        sizes |= tile | dict(G=32 if mx else 16)
        return compile_kernel(grouped_scaled_kernel, pointers, sizes, cc, kernel.warps, kernel.stages)
    if isinstance(kernel, Gemv):
        pointers = common | dict(x="*i32", x_scales="*u8", w="*i32", w_scales="*u8", index="*i64")
        sizes |= dict(BLOCK_N=kernel.block_n, BLOCK_K=kernel.block_k, PDL=cc >= 90)
        return compile_kernel(grouped_gemv_kernel, pointers, sizes, cc, kernel.warps)
    units = (dict(x_unit="*fp32") if mx else {}) | (dict(w_top="*u8") if tops else {})
    sizes |= dict(BLOCK_N=kernel.block_n, BLOCK_M=kernel.block_m, STAGES=kernel.stages)
    if isinstance(kernel, Gemm):
        pointers = common | units | dict(x="*fp8e5" if mx else "*bf16", w_scales="*i32", selectors="*i32")
        sizes |= dict(BLOCK_K=kernel.block_k, PROMOTE=0, PDL=cc >= 90)
        return compile_kernel(grouped_gemm_kernel, pointers, sizes, cc, kernel.warps, kernel.stages)
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    from wush_compile.kernels.triton.grouped.hopper import grouped_hopper_kernel

    x_layout, w_layout = NVMMASharedLayout(128, 8 if mx else 16), NVMMASharedLayout(64, 32)
    pointers = units | dict(w_scales="*u8", table="*i32", out="*bf16", tiles="i32")
    pointers["x"] = f"tensordesc<{'fp8e5' if mx else 'bf16'}[{kernel.block_m}, 128],{x_layout!r}>"
    pointers["w"] = f"tensordesc<i32[{kernel.block_n}, 16],{w_layout!r}>"
    launched, sizes["REGISTERS"] = REGISTERS[kernel.programs]
    return compile_kernel(grouped_hopper_kernel, pointers, sizes, cc, 4, source=GluonASTSource, maxnreg=launched)


@pytest.mark.parametrize("format, k", [("mxfp4", 2048), ("mxfp4", 2880), ("nvfp4", 768)])
def test_hopper_products_stay_in_registers(format, k):
    """As in `linear`: weights go from the decoder's registers to the tensor core, and the loops spill nothing. As many
    programs fit a multiprocessor as are launched for each."""
    tiles = {*HOPPER[format].values(), GEMM[format][8]} if k == 2048 else {list(HOPPER[format].values())[-2]}
    for kernel in tiles:
        compiled = compile_grouped(format, kernel, 90, k=k)
        code, loops = sass(compiled), 1
        programs, expected = getattr(kernel, "programs", 1), 1
        if isinstance(kernel, Hopper):
            loops, expected = 2, 4 if format == "mxfp4" else 8
        assert programs * (compiled.metadata.shared + 1024) <= 228 * 1024, kernel
        loops_found = main_loops(code, expected)
        assert len(loops_found) == loops, kernel
        for loop in loops_found:
            products = re.findall(r"[QH]GMMA\.\S+ R\d+, (\S+),", loop)
            assert products and all(p.startswith("R") for p in products), kernel
            assert not re.search(r"\b(STL|LDL|STS)\b", loop), kernel
            assert not overwritten_too_early(2 * loop) and nothing_runs_on(loop), kernel


@pytest.mark.parametrize("cc", [100, 120])
@both
def test_blackwell_products_are_native(cc, format):
    kernel = choose(format, "same", 4096, 128, 1536, 2048, divmod(cc, 10))
    assert isinstance(kernel, Scaled)
    compiled = compile_grouped(format, kernel, cc)
    instruction = r"tcgen05\.mma\S*kind::mxf4\S*block_scale" if cc < 120 else r"mma\.sync\S*kind::mxf4\S*block_scale"
    found = set(re.findall(r"(?:tcgen05\.mma|mma\.sync|wgmma\.mma)\S+", compiled.asm["ptx"]))
    assert found and all(re.match(instruction, f) for f in found), found


@pytest.mark.parametrize("format", ["mxfp4_bf16", "nvfp4"])
def test_older_gpus_compile(format):
    """Also those whose shared memory is small."""
    for rows in (64, 1024, 100000):
        kernel = choose(format, "same", rows, 32, 2880, 2880, (8, 9))
        compiled = compile_grouped(format, kernel, 89, 32, 2880, 2880)
        assert compiled.metadata.shared <= 99 * 1024, kernel
        assert re.search(r"mma\.sync\S*\.f32\.bf16\.bf16\.f32", compiled.asm["ptx"])


def test_tiles_are_the_fastest_measured():
    """Within 6 % of the fastest candidate of the run that the tables rest on."""
    run = json.loads((ROOT / "benchmarks/results/tune_experts_h200.json").read_text())
    sizes = {"Qwen3-30B-A3B": (128, 8), "gpt-oss-20b": (32, 4)}
    assert len(run["rows"]) == 24
    for row in run["rows"]:
        experts, chosen = sizes[row["layer"]]
        times = {tile: us for us, tile in row["all"]}
        tile = choose(row["format"], "same", row["tokens"] * chosen, experts, row["N"], row["K"])
        assert times.get(repr(tile), inf) <= 1.06 * min(times.values()), (
            row["layer"],
            row["part"],
            row["tokens"],
            tile,
        )


def test_rows_of_their_own_use_integer_products():
    code = sass(compile_grouped("mxfp4", choose("mxfp4", "same", 8, 128, 1536, 2048), 90))
    assert "IDP" in code and "STL" not in code
