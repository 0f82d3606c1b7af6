"""csrc's FP4 products: layouts on the host, machine code of every target, and results on a GPU against float64.

On a GPU without the FP4 instruction the library of sm_90a runs the kernel of sm_120 with the instruction emulated.
"""

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_csrc import _no_nvcc, build, poison, resources, sass

from wush_compile import formats
from wush_compile.formats import FORMATS
from wush_compile.kernels import cuda
from wush_compile.ops import layouts

gpu = pytest.mark.gpu
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
DEVICE = "cuda"
NOT_BUILT = "looks at compiled CUDA kernels: `make cuda` builds them"

# -- layouts, on the host --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """csrc/fp4_layout.h compiled for this machine."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    path = tmp_path_factory.mktemp("layout") / "layout.so"
    source = Path(__file__).with_name("fp4_layout.cpp")
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{build.HERE}", source, "-o", path]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


def table(function, *shape) -> np.ndarray:
    out = np.full(shape, -1, np.int32)
    function(out.ctypes.data_as(ctypes.c_void_p))
    return out


@pytest.mark.parametrize("rows, groups", [(1, 1), (3, 7), (128, 4), (129, 4), (130, 5), (300, 34), (257, 128)])
def test_scale_tiles_are_those_of_the_reference(layout, rows, groups):
    layout.bytes.argtypes = layout.offsets.argtypes = None
    offsets = np.full((rows, groups), -1, np.int64)
    layout.offsets(ctypes.c_int64(rows), ctypes.c_int64(groups), offsets.ctypes.data_as(ctypes.c_void_p))
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    swizzled = layouts.swizzle_scales(scales)
    assert layout.bytes(ctypes.c_int64(rows), ctypes.c_int64(groups)) == swizzled.numel()
    placed = torch.zeros(swizzled.numel(), dtype=torch.uint8)
    placed[torch.from_numpy(offsets).flatten()] = scales.flatten()
    assert len(np.unique(offsets)) == rows * groups
    assert torch.equal(placed, swizzled.flatten())


def test_cutlass_looks_for_scales_there(tmp_path):
    """The layout that CUTLASS's sm_100 kernels are given, computed by its own headers, is that of the tiles."""
    compiler, cutlass = shutil.which("c++") or shutil.which("g++"), importlib.util.find_spec("cutlass_library")
    if _no_nvcc() or compiler is None or cutlass is None:
        pytest.skip(_no_nvcc() or "needs a C++ compiler and the package nvidia-cutlass")
    dryrun = [build.find_nvcc()[0], "--dryrun", build.HERE / "library.cu"]
    said = subprocess.run(dryrun, capture_output=True, text=True).stderr
    cuda_headers = re.findall(r'"(?:-I)?(/[^"]+)"', " ".join(re.findall(r"INCLUDES=(.*)", said)))
    headers = [next(iter(cutlass.submodule_search_locations)) + "/source/include", *cuda_headers]
    source, library = Path(__file__).with_name("cutlass_scales.cpp"), tmp_path / "scales.so"
    includes = [f"-I{h}" for h in headers]
    subprocess.run([compiler, "-std=c++17", "-w", "-shared", "-fPIC", *includes, source, "-o", library], check=True)
    for group in (16, 32):
        for rows, k in ((1, group), (130, 160), (257, 2080)):
            got = np.full((rows, k // group), -1, np.int64)
            ctypes.CDLL(str(library)).offsets(group, rows, k, got.ctypes.data_as(ctypes.c_void_p))
            index = torch.arange(rows * (k // group)).view(rows, -1) + 1
            digits = [layouts.swizzle_scales((index >> shift & 255).to(torch.uint8)).flatten() for shift in (0, 8, 16)]
            placed = digits[0].long() + (digits[1].long() << 8) + (digits[2].long() << 16)
            assert torch.equal(placed[torch.from_numpy(got).flatten()], index.flatten())


@pytest.mark.parametrize("target", ["sm_100a", "sm_103a"])
@both
def test_cutlass_takes_what_the_preparations_make(target, format):
    """Every M, N a multiple of 8, K of 32: CUTLASS's own checks, which need no device; an odd width it refuses. Looks
    at libraries that were built."""
    path = cuda.libraries().get(target)
    if path is None:
        pytest.skip(NOT_BUILT)
    refusal = ctypes.CDLL(str(path)).wush_linear_refusal
    refusal.argtypes, refusal.restype = [ctypes.c_int] * 2 + [ctypes.c_int64] * 3, ctypes.c_char_p
    number = list(FORMATS).index(format)
    for tile in (0, 1):
        for m in (1, 7, 128, 300, 8192):
            for n in (8, 40, 4096, 28672):
                for k in (32, 96, 4096, 14336):
                    assert refusal(number, tile, m, n, k) is None, (tile, m, n, k)
        assert refusal(number, tile, 16, 33, 128) is not None
        assert refusal(number, tile, 16, 64, 48) is not None


@pytest.mark.parametrize("row_bytes", [64, 128, 256])
def test_chunks_are_permuted_and_meet_all_banks(layout, row_bytes):
    """Within a row a permutation; the eight rows of one matrix of ldmatrix lie in eight different quads of banks."""
    for row in range(128):
        assert sorted(layout.chunk(row_bytes, row, c) for c in range(row_bytes // 16)) == list(range(row_bytes // 16))
    for row in range(0, 128, 8):
        for c in range(row_bytes // 16):
            banks = {(r * row_bytes // 16 + layout.chunk(row_bytes, r, c)) % 8 for r in range(row, row + 8)}
            assert len(banks) == 8


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_scale_words_do_not_meet_in_a_bank(layout, rows):
    at = [layout.scale_row(r) for r in range(rows)]
    assert len(set(at)) == rows and max(at) < layout.scale_rows(rows)
    for first in range(0, rows, 16):  # read: A's lanes, 16 rows
        assert len({a % 32 for a in at[first : first + 16]}) == 16
    side = max(1, rows // 32)  # written from a swizzled tile: its neighbours
    for first in range(0, rows, 32):
        written = [at[i % side * 32 + i // side] for i in range(first, min(first + 32, rows))]
        assert max(Counter(a % 32 for a in written).values()) <= (2 if rows == 64 else 1)


def cute(shape, stride):
    """All offsets of a CuTe layout, the first mode fastest."""
    offsets = np.zeros(1, np.int64)
    for n, step in zip(shape, stride, strict=True):
        offsets = (offsets[None, :] + np.arange(n)[:, None] * step).reshape(-1)
    return offsets


def test_fragments_are_those_of_the_instruction(layout):
    """PTX ISA's formulas, which fp4_layout.h follows, against CuTe's layouts of the same instruction (CUTLASS 4.2,
    mma_traits_sm120.hpp: (lane, element) -> m + 16k, n + 8k; C is SM80_16x8_Row); and every element held once."""

    def offsets(lanes, elements):  # [lane, element]
        return np.array([[a + b for b in elements] for a in lanes])

    a, b = table(layout.fragment_a, 32, 32, 2), table(layout.fragment_b, 32, 16, 2)
    want_a = offsets(cute((4, 8), (128, 1)), cute((8, 2, 2), (16, 8, 512)))
    want_b = offsets(cute((4, 8), (64, 1)), cute((8, 2), (8, 256)))
    assert np.array_equal(a[..., 0] + 16 * a[..., 1], want_a)
    assert np.array_equal(b[..., 1] + 8 * b[..., 0], want_b)
    c = table(layout.fragment_c, 32, 4, 2)
    want_c = offsets(cute((4, 8), (32, 1)), cute((2, 2), (16, 8)))
    assert np.array_equal(c[..., 0] + 16 * c[..., 1], want_c)
    for held, size in ((want_a, 16 * 64), (want_b, 64 * 8), (want_c, 16 * 8)):
        assert sorted(held.flatten()) == list(range(size))
    scales = table(layout.fragment_scales, 32, 2)
    assert np.array_equal(scales[:, 0], cute((2, 2, 8), (8, 0, 1)))
    assert np.array_equal(scales[:, 1], cute((4, 8), (0, 1)))


def test_ldmatrix_gives_the_fragments(layout):
    """Lane l's register j holds bytes 4(l % 4).. of the row that lane 8j + l/4 points to (PTX ISA, ldmatrix)."""
    a, b = table(layout.fragment_a, 32, 32, 2), table(layout.fragment_b, 32, 16, 2)
    pointed_a, pointed_b = table(layout.ldmatrix_a, 32, 2), table(layout.ldmatrix_b, 32, 2)
    for lane in range(32):
        for j in range(4):
            for i in range(8):
                row, chunk = pointed_a[8 * j + lane // 4]
                assert (row, chunk * 32 + lane % 4 * 8 + i) == tuple(a[lane, 8 * j + i])
                row, chunk = pointed_b[8 * j + lane // 4]
                k, n = b[lane, 8 * (j % 2) + i]
                assert (row, chunk * 32 + lane % 4 * 8 + i) == (n + 8 * (j // 2), k)


# BM, BN, BK, warps along M, N, K, stages, blocks on a multiprocessor: the tiles of csrc/linear_tiles.h.
TILES = {
    "narrow": (16, 32, 512, 1, 1, 4, 3, 2),
    "middle": (64, 32, 256, 2, 1, 2, 3, 2),
    "wide": (128, 128, 128, 2, 4, 1, 4, 1),
}


def test_the_counted_model_knows_the_tiles(layout):
    """benchmarks/projection.py chooses as the launchers do, and its tiles are theirs."""
    spec = importlib.util.spec_from_file_location("projection", build.HERE.parent / "benchmarks" / "projection.py")
    projection = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(projection)
    assert [tuple(row) for row in table(layout.shapes, 3, 8)] == list(TILES.values())
    assert [(t.rows, t.columns, t.resident) for t in projection.SM120] == [(t[0], t[1], t[7]) for t in TILES.values()]
    b200, rtx = projection.DEVICES
    for m in (1, 16, 17, 64, 65, 128, 129, 500, 1024, 8192):
        for n in (32, 4096, 6144, 28672):
            args = ctypes.c_int64(m), ctypes.c_int64(n)
            assert projection.SM120[layout.choose_sm120(*args, rtx.multiprocessors)] == projection.choose(rtx, m, n)
            assert projection.SM100[layout.choose_sm100(*args, b200.multiprocessors)] == projection.choose(b200, m, n)
    c = projection.count(rtx, "mxfp4", 1024, 4096, 4096)  # by hand: 8 x 32 tiles in 2 waves of 170
    assert c.tile.name == "wide" and c.useful == 1 and c.busy == 256 / 340
    assert c.moved == (1024 + 4096) * (2048 + 128) + 2 * 1024 * 4096
    assert c.compute_time == pytest.approx(2 * 340 * 128 * 128 * 4096 / 1676e12)
    assert projection.count(rtx, "nvfp4", 1, 4096, 4096).useful == 1 / 16


# Bytes of shared memory of a block and registers of a thread, mxfp4 and nvfp4: what the tiles were laid out for. A
# multiprocessor of compute capability 12 has 100 KiB (1 KiB of each block is the system's) and 65536 registers.
SHARED = {"narrow": (39168, 41472), "middle": (39552, 41856), "wide": (70656, 75264)}
REGISTERS = {"narrow": (150, 168), "middle": (160, 168), "wide": (206, 192)}


@pytest.mark.parametrize("tile", TILES)
def test_budgets(layout, tile):
    *_, warps_m, warps_n, warps_k, _, blocks = TILES[tile]
    number = list(TILES).index(tile)
    shared = tuple(layout.shared_memory(number, group) for group in (32, 16))
    assert shared == SHARED[tile]
    threads = 32 * warps_m * warps_n * warps_k
    assert blocks * (max(shared) + 1024) <= 100 * 1024 and max(shared) <= 99 * 1024
    assert blocks * threads * -(-max(REGISTERS[tile]) // 8) * 8 <= 65536


# -- machine code ----------------------------------------------------------------------------------------------------

OTHER_PRODUCTS = r"\b(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|DMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b"


def tile_of(kernel: str) -> str:
    """The tile's name, from the mangled template argument."""
    return list(TILES)[int(re.search(r"ChoiceE(\d)E", kernel)[1])]


def loop(code: str) -> str:
    """The instructions between the last backward branch over a product and its target."""
    lines = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    products = [at for at, text in lines if "OMMA" in text]
    for at, text in lines:
        target = re.search(r"\bBRA\S*\s.*?(?:`\(\.L_x_\d+\)|0x([0-9a-f]+))", text)
        if target and target[1] and int(target[1], 16) <= products[0] <= products[-1] < at:
            return "\n".join(t for a, t in lines if int(target[1], 16) <= a <= at)
    raise AssertionError("no loop around the products")


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
@both
def test_sm120_products_are_the_instruction(target, format):
    """Every product is OMMA on e2m1 with block scales, as many as tile / instruction in the loop; nothing spills."""
    if _no_nvcc():
        pytest.skip(_no_nvcc())
    path = build.compile_object(build.HERE / f"linear_sm120_{format}.cu", target)
    seen = set()
    code_of = {name: code for name, code in sass(path).items() if "linear_kernel" in name}
    used = resources(path)
    for name, code in code_of.items():
        tile = tile_of(name)
        bm, bn, bk, warps_m, warps_n, warps_k, *_ = TILES[tile]
        wm, wn, steps = bm // warps_m, bn // warps_n, bk // 64 // warps_k
        inside = loop(code)
        products = re.findall(r"\bOMMA\S*", inside)
        kind = r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\." + ("E8" if format == "mxfp4" else r"UE4M3\.4X")
        assert len(products) == len(re.findall(r"\bOMMA", code)) == wm // 16 * (wn // 8) * steps, (tile, len(products))
        assert all(re.fullmatch(kind, p) for p in products), set(products)
        # The selector of scale bytes is a uniform register: mxfp4's odd steps take the word's upper two bytes.
        upper = re.findall(r"\bOMMA.*, UR\d+", inside)
        assert len(upper) == (len(products) // 2 if format == "mxfp4" else 0), tile
        assert not re.search(OTHER_PRODUCTS, code)
        assert not re.search(r"\b(LDL|STL)", code), tile
        assert not re.search(r"\b(F2F|F2FP|I2F|I2FP|PRMT\S* .*E2M1)\b", inside), tile  # nothing is unpacked
        assert len(re.findall(r"\bLDSM\.16\.M88\.4\b", inside)) == (wm // 16 + wn // 16) * steps
        assert "LDGSTS.E.BYPASS.128" in inside or "LDGSTS.E.BYPASS.LTC128B.128" in inside
        assert used[name]["spills"] == used[name]["stack"] == 0
        assert used[name]["registers"] <= REGISTERS[tile][format == "nvfp4"], used[name]
        seen.add(tile)
    assert seen == set(TILES)


@pytest.mark.parametrize("target", ["sm_100a", "sm_103a"])
@pytest.mark.parametrize("tile", ["narrow", "wide"])
@both
def test_sm100_products_are_the_instruction(target, format, tile):
    """tcgen05 with block scales, four a tile of K (256 / 64); the wide kernel's first tile of K is a loop of its own,
    since its accumulators overlap. Looks at objects that were built: CUTLASS takes its time."""
    if _no_nvcc():
        pytest.skip(_no_nvcc())
    source = build.HERE / f"linear_sm100_{format}_{tile}.cu"
    try:
        path, _ = build.object_path(source, target, *build.find_nvcc())
    except build.BuildError as error:
        pytest.skip(str(error))
    if not path.exists():
        pytest.skip(NOT_BUILT)
    ((name, code),) = ((n, c) for n, c in sass(path).items() if "GemmUniversal" in n)
    products = re.findall(r"\bUTCOMMA\S*", code)
    pair = ".2CTA" if tile == "wide" else ""
    block16 = "" if format == "mxfp4" else ".4X" if target == "sm_100a" else ".BLOCK16"
    assert len(products) == (8 if tile == "wide" else 4) and set(products) == {"UTCOMMA" + pair + block16}, products
    assert "UTCCP" in code and "UTMALDG" in code  # scales into tensor memory; tiles by TMA
    assert not re.search(OTHER_PRODUCTS, code) and not re.search(r"\b(LDL|STL)\b", code)
    assert resources(path)[name]["spills"] == 0


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear():
    """fp4_linear of the library, scales row-major or swizzled."""
    capability = torch.cuda.get_device_capability()
    reason = cuda.unavailable(capability)
    if reason:
        pytest.skip(f"cuda {reason}")
    library = cuda.load(cuda.TARGETS[capability])

    def run(
        x, w, format, bias=None, residual=None, dtype=torch.float32, swizzled=(False, False), tile=-1, g=(None, None)
    ):
        (codes, scales), (weight, weight_scales) = x, w
        if swizzled[0]:
            scales = layouts.swizzle_scales(scales.flatten(0, -2))
        if swizzled[1]:
            weight_scales = layouts.swizzle_scales(weight_scales)
        poison(4 * codes.shape[:-1].numel() * weight.shape[0], 2 * codes.shape[:-1].numel() * weight.shape[0])
        return library.fp4_linear(
            codes, scales, g[0], weight, weight_scales, g[1], bias, residual, format, dtype, *swizzled, tile
        )

    run.library = library
    # The fourth tile of sm_120: sm_100's preparations of odd widths and row-major scales, then the narrow tile.
    run.tiles, run.dtypes = (
        (4, (torch.float32, torch.bfloat16, torch.float16)) if capability[0] != 10 else (2, (torch.bfloat16,))
    )
    return run


def operand(rows, k, format, seed, wide=False):
    """Random codes; scales of a few octaves, so that every fp32 sum below is exact, or, `wide`, of many."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {
        ("mxfp4", False): (125, 129),
        ("nvfp4", False): (0x30, 0x3F),
        ("mxfp4", True): (107, 147),
        ("nvfp4", True): (0x01, 0x7E),
    }[format, wide]
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator)
    groups = k // FORMATS[format].group_size
    scales = torch.randint(low, high + 1, (rows, groups), dtype=torch.uint8, generator=generator)
    return codes.to(DEVICE), scales.to(DEVICE)


def product(x, w, format):
    """The float64 product, and the sum of the terms' magnitudes."""
    a, b = (formats.dequantize(*o, format).double() for o in (x, w))
    return a @ b.T, a.abs() @ b.abs().T


def scalar(g):
    return torch.tensor([g], device=DEVICE)


# Every tail of M and N, one or several tiles of each, K shorter and longer than a stage and than the pipeline.
SHAPES = [
    (1, 32, 512),
    (1, 128, 4096),
    (2, 8, 32),
    (7, 33, 96),
    (15, 31, 1024),
    (16, 257, 2080),
    (17, 64, 256),
    (33, 100, 544),
    (64, 96, 4096),
    (65, 129, 1056),
    (100, 1, 512),
    (127, 255, 128),
    (128, 128, 128),
    (129, 300, 640),
    (257, 384, 1536),
    (1100, 130, 288),
    (3, 4096, 64),
]
ODD = [(5, 40, 16), (9, 64, 48), (17, 65, 80), (130, 200, 336), (66, 31, 1040), (1, 129, 2064)]  # nvfp4 only


@gpu
@pytest.mark.parametrize("format, m, n, k", [("mxfp4", *s) for s in SHAPES] + [("nvfp4", *s) for s in SHAPES + ODD])
def test_products_are_exact(linear, format, m, n, k):
    """Sums that fp32 holds exactly come out exactly, whatever their order, from every tile and layout of scales."""
    x, w = operand(m, k, format, 1), operand(n, k, format, 2)
    sums, _ = product(x, w, format)
    assert torch.equal(sums, sums.float().double())
    for tile in range(linear.tiles):
        for swizzled in ((False, False), (True, False), (False, True), (True, True)):
            for dtype in linear.dtypes[:2]:
                got = linear(x, w, format, dtype=dtype, swizzled=swizzled, tile=tile)
                wrong = (got != sums.to(dtype)).sum().item()
                assert wrong == 0, f"{wrong} of {got.numel()} wrong: tile {tile}, swizzled {swizzled}, {dtype}"


@gpu
@both
def test_epilogue_rounds_where_the_op_does(linear, format):
    """alpha, bias, one rounding, residual: bit for bit, all combinations."""
    for m, n in ((5, 64), (40, 33), (200, 136)):
        k = 1024
        x, w = operand(m, k, format, 3), operand(n, k, format, 4)
        sums = product(x, w, format)[0].float()
        for dtype in linear.dtypes:
            bias, residual = torch.randn(n, device=DEVICE).to(dtype), torch.randn(m, n, device=DEVICE).to(dtype)
            for gx in (None, scalar(3.0), scalar(0.37)):
                for gw in (None, scalar(0.11)):
                    for b in (None, bias):
                        for r in (None, residual):
                            y = sums
                            if gx is not None or gw is not None:
                                y = y * (1.0 / (gx if gw is None else gw if gx is None else gx * gw))
                            y = (y if b is None else y + b.float()).to(dtype)
                            y = y if r is None else y + r
                            for tile in range(linear.tiles):
                                assert torch.equal(linear(x, w, format, b, r, dtype, tile=tile, g=(gx, gw)), y)


@gpu
@both
@pytest.mark.parametrize("m, n, k", [(1, 128, 4096), (24, 257, 4096), (300, 256, 1536)])
def test_products_of_any_scales_are_within_fp32(linear, format, m, n, k):
    """Scales of many octaves: the error of a sum of exact terms, one a group, in fp32."""
    x, w = operand(m, k, format, 5, wide=True), operand(n, k, format, 6, wide=True)
    sums, magnitude = product(x, w, format)
    terms = k // FORMATS[format].group_size + 4
    for tile in range(linear.tiles if torch.float32 in linear.dtypes else 0):
        got = linear(x, w, format, tile=tile).double()
        worst = ((got - sums).abs() / magnitude).max().item() * 2**24
        print(f"{format} {m}x{n}x{k} tile {tile}: error {worst:.2f} of 2^-24 of the terms")
        assert worst <= terms


@gpu
@both
def test_not_a_number_stays_in_its_row(linear, format):
    m, n, k = 70, 90, 1536
    x, w = operand(m, k, format, 7), operand(n, k, format, 8)
    clean = product(x, w, format)[0].to(linear.dtypes[0])
    mark = 0xFF if format == "mxfp4" else 0x7F
    x[1][5, 3], x[1][69, -1], w[1][17, 0], w[1][89, 8] = mark, mark, mark, mark
    want = clean.clone()
    want[[5, 69]] = float("nan")
    want[:, [17, 89]] = float("nan")
    for tile in range(linear.tiles):
        for swizzled in (False, True):
            got = linear(x, w, format, dtype=linear.dtypes[0], swizzled=(swizzled, swizzled), tile=tile)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@gpu
@both
def test_padding_of_the_groups_is_not_read(linear, format):
    """Scales beyond K, in the last word of a swizzled tile, may be anything: here NaN."""
    if torch.float32 not in linear.dtypes:
        pytest.skip("CUTLASS reads the padding, so it must be zeros")
    group = FORMATS[format].group_size
    m, n, k = 20, 40, 5 * group
    x, w = operand(m, k, format, 9), operand(n, k, format, 10)
    mark = 0xFF if format == "mxfp4" else 0x7F

    def poisoned(scales):
        wide = torch.full((scales.shape[0], 8), mark, dtype=torch.uint8, device=DEVICE)
        wide[:, :5] = scales
        return layouts.swizzle_scales(wide)

    for tile in range(3):
        got = linear.library.fp4_linear(
            x[0], poisoned(x[1]), None, w[0], poisoned(w[1]), None, None, None, format, torch.float32, True, True, tile
        )
        assert torch.equal(got.double(), product(x, w, format)[0])


@gpu
@both
def test_leading_dimensions_graphs_and_nothing(linear, format):
    x, w = operand(6, 256, format, 11), operand(24, 256, format, 12)
    dtype = linear.dtypes[0]
    want = product(x, w, format)[0].to(dtype)
    shaped = tuple(t.view(2, 3, -1) for t in x)
    assert torch.equal(linear(shaped, w, format, dtype=dtype), want.view(2, 3, 24))
    assert linear(tuple(t[:0] for t in x), w, format, dtype=dtype).shape == (0, 24)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures a stream of its own
        got = linear.library.fp4_linear(*x, None, *w, None, None, None, format, dtype, False, False)
    got.zero_()
    graph.replay()
    assert torch.equal(got, want)


@gpu
@both
def test_provider(linear, monkeypatch, format):
    """The op as the dispatcher calls it, with strided operands; what it leaves to others is said."""
    x, w = operand(6, 256, format, 15), operand(24, 256, format, 16)
    dtype = linear.dtypes[0]
    bias, residual = torch.randn(24, device=DEVICE).to(dtype), torch.randn(24, 6, device=DEVICE).to(dtype).T
    args = [*x, scalar(2.0), torch.cat((w[0], w[0]), 1)[:, :128], w[1], scalar(0.7), bias, residual, format, dtype]
    want = (product(x, w, format)[0].float() * (1 / (scalar(2.0) * scalar(0.7))) + bias.float()).to(dtype) + residual
    assert torch.equal(cuda.fp4_linear(*args), want)
    emulated = torch.cuda.get_device_capability() == (9, 0)
    assert (cuda.refuses_fp4_linear(*args) is not None) == emulated
    monkeypatch.setattr(cuda, "_target", lambda t: "sm_120a")
    assert cuda.refuses_fp4_linear(*args) is None
    assert "bias is" in cuda.refuses_fp4_linear(*args[:6], bias.double(), residual, format, dtype)
    assert "int4" in cuda.refuses_fp4_linear(*args[:8], "int4", dtype)
    monkeypatch.setattr(cuda, "_target", lambda t: "sm_100a")
    assert "output is" in cuda.refuses_fp4_linear(*args[:9], torch.float16)


@gpu
def test_wrong_operands_are_errors(linear):
    x, w = operand(4, 64, "mxfp4", 13), operand(8, 64, "mxfp4", 14)
    run = linear.library.fp4_linear
    dtype = linear.dtypes[0]
    changes = (
        ({1: x[1][:3]}, "elements"),
        ({4: w[1].cpu()}, "another device"),
        ({0: x[0].T.contiguous().T}, "contiguous"),
        ({0: x[0][:, :16].contiguous(), 1: x[1][:, :1].contiguous()}, "channels"),
        ({8: "int4"}, "no CUDA kernel"),
        ({6: torch.zeros(7, device=DEVICE, dtype=dtype)}, "elements"),
        ({12: 7}, "no such tile"),
        ({6: torch.zeros(8, device=DEVICE, dtype=torch.float64)}, "dtype"),
    )
    for change, message in changes:
        args = [*x, None, *w, None, None, None, "mxfp4", dtype, False, False, -1]
        for i, value in change.items():
            args[i] = value
        with pytest.raises(RuntimeError, match=message):
            run(*args)
    buffer = torch.zeros(4 * 32 + 1, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(RuntimeError, match="aligned"):
        run(buffer[1:].view(4, 32), x[1], None, *w, None, None, None, "mxfp4", dtype, False, False)


@gpu
@pytest.mark.parametrize("rows, groups", [(1, 1), (3, 7), (128, 4), (300, 34), (1025, 448)])
def test_swizzle_is_the_reference(linear, rows, groups):
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8, device=DEVICE)
    want = layouts.swizzle_scales(scales)
    poison(want.numel())
    assert torch.equal(linear.library.swizzle_scales(scales), want)


# -- sm_100's epilogue, on Hopper ------------------------------------------------------------------------------------


@functools.cache
def epilogue_library() -> Path:
    """tests/cutlass_epilogue.cu for sm_90a, built once for its sources; `BuildError` without nvcc or CUTLASS."""
    source = Path(__file__).with_name("cutlass_epilogue.cu")
    headers = build.HERE / "linear_epilogue.cuh", build.HERE / "linear.h"
    text = b"".join(p.read_bytes() for p in (source, *headers)) + b"-fmad=false"  # as csrc/build.py compiles
    path = build.OUT.parent / "tests" / f"epilogue-{hashlib.sha256(text).hexdigest()[:12]}.so"
    if not path.exists():
        nvcc, _ = build.find_nvcc()
        cutlass = build.package_directory("cutlass_library", "pip install nvidia-cutlass") / "source"
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                nvcc,
                "-shared",
                "-O3",
                "-std=c++20",
                "-fmad=false",
                "-Xcompiler=-fPIC",
                "-cudart=static",
                "--expt-relaxed-constexpr",
                "-gencode=arch=compute_90a,code=sm_90a",
                f"-I{build.HERE}",
                f"-I{cutlass}/include",
                f"-I{cutlass}/tools/util/include",
                source,
                "-o",
                path,
            ],
            check=True,
        )
    return path


@gpu
def test_the_epilogue_of_sm100_rounds_where_the_op_does():
    """Its tree of CUTLASS's visitors behind a bf16 product of small integers: bit for bit, all combinations."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU: CUTLASS's Hopper kernels run on no other")
    try:
        run = ctypes.CDLL(str(epilogue_library())).epilogue
    except build.BuildError as error:
        pytest.skip(str(error))
    run.restype = ctypes.c_char_p

    def address(t):
        return ctypes.c_void_p(None if t is None else t.data_ptr())

    for m, n, k in ((1, 8, 64), (130, 72, 96), (300, 264, 512)):
        x = torch.randint(-6, 7, (m, k), device=DEVICE).bfloat16()
        w = torch.randint(-6, 7, (n, k), device=DEVICE).bfloat16()
        sums = (x.double() @ w.double().T).float()
        bias = torch.randn(n, device=DEVICE).bfloat16() * 20
        residual = torch.randn(m, n, device=DEVICE).bfloat16() * 90
        for gx, gw, b, r in itertools.product(
            (None, scalar(3.0)), (None, scalar(0.37)), (None, bias), (None, residual)
        ):
            y = sums * (1.0 / ((1.0 if gx is None else gx) * (1.0 if gw is None else gw)))
            y = (y if b is None else y + b.float()).bfloat16()
            y = y if r is None else y + r
            out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=DEVICE)
            torch.cuda.synchronize()
            problem = run(m, n, k, *map(address, (x, w, gx, gw, b, r, out)), None)
            assert problem is None, problem
            torch.cuda.synchronize()
            assert torch.equal(out, y), (m, n, k, gx, gw, b is None, r is None)
