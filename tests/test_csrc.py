"""csrc: builds for every target, their machine code, and, on a GPU, the quantizers bit for bit."""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

from wush_compile.formats import FORMATS
from wush_compile.kernels import cuda, libraries
from wush_compile.kernels import dispatch as kernels
from wush_compile.ops import core as ops
from wush_compile.ops import fused as fused_ops
from wush_compile.ops import layouts

ROOT = pathlib.Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("csrc_build", ROOT / "csrc" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

gpu = pytest.mark.gpu
both = pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
DEVICE = "cuda"


@functools.cache
def _no_nvcc() -> str | None:
    try:
        build.find_nvcc()
    except build.BuildError as error:
        return str(error)
    return None


@pytest.fixture
def nvcc():
    if _no_nvcc():
        pytest.skip(_no_nvcc())


# -- build -----------------------------------------------------------------------------------------------------------


def _cuobjdump() -> str | None:
    """CUDA's own, or the one that Triton carries."""
    beside = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    inside = triton and pathlib.Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return beside or (str(inside) if inside and inside.exists() else None)


@functools.cache
def sass(path: pathlib.Path) -> dict[str, str]:
    """Kernel -> its machine code."""
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton")
    nvdisasm = str(pathlib.Path(tool).parent)
    run = subprocess.run(
        [tool, "--dump-sass", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": nvdisasm + os.pathsep + os.environ["PATH"]},
    )
    if "Cannot decode architecture" in run.stderr:
        pytest.skip(f"{tool} is too old for some targets")
    assert run.returncode == 0, run.stderr
    parts = re.split(r"Function : (\S+)", run.stdout)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def resources(path: pathlib.Path) -> dict[str, dict[str, int]]:
    """Kernel -> registers, bytes of shared memory and of spills, from ptxas's report."""
    found = {}
    for name, text in re.findall(
        r"Compiling entry function '(\S+)' for \S+\n(.*?)(?=ptxas info\s+: Compiling|\Z)",
        path.with_suffix(".log").read_text(),
        re.S,
    ):
        shared = re.search(r"(\d+) bytes smem", text)
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "shared": int(shared[1]) if shared else 0,
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", text))),
            "stack": int(re.search(r"(\d+) bytes stack frame", text)[1]),
        }
    return found


@pytest.mark.parametrize("target", build.GPU_TARGETS)
def test_the_quantizer_builds(nvcc, target):
    """One quantizer for every target: nothing spills, and three CTAs of 128 threads find room on a multiprocessor."""
    path = build.compile_object(build.HERE / "quantize_mxfp4.cu", target)
    kernels_of = {name: used for name, used in resources(path).items() if "quantize_kernel" in name}
    assert len(kernels_of) == 32  # 2 dtypes, with and without transform, mse or not, 4 prologues
    for name, used in kernels_of.items():
        assert used["spills"] == used["stack"] == 0, name
        assert used["registers"] <= 168 and used["shared"] <= 40 * 1024, (name, used)


@pytest.mark.parametrize("target", build.GPU_TARGETS)
def test_the_quantizers_convert_natively_on_blackwell(nvcc, target):
    """cvt.rn.satfinite.e2m1x2.f32 in every kernel where the target has it, in none elsewhere; no local memory."""
    for name, code in sass(build.compile_object(build.HERE / "quantize_mxfp4.cu", target)).items():
        if "quantize_kernel" in name:
            assert ("F2FP.SATFINITE.E2M1" in code) == (target != "sm_90a"), name
            assert "LDL" not in code and "STL" not in code, name


def test_objects_are_cached(nvcc):
    source = build.HERE / "library.cu"
    path = build.compile_object(source, "sm_90a")
    before = path.stat().st_mtime_ns
    assert build.compile_object(source, "sm_90a") == path and path.stat().st_mtime_ns == before


def test_a_header_makes_another_object(tmp_path, monkeypatch):
    """The name of an object depends on the headers that its source includes, through headers too, and on no others."""
    monkeypatch.setattr(build, "_command", lambda *args: ["nvcc"])
    for name, text in {"a.cu": '#include "b.h"\n', "b.h": '#include "c.h"\n', "c.h": "1\n", "d.h": "2\n"}.items():
        (tmp_path / name).write_text(text)

    def name() -> str:
        return build.object_path(tmp_path / "a.cu", "sm_90a", "nvcc", "13.0", tmp_path)[0].name

    first = name()
    (tmp_path / "d.h").write_text("3\n")
    assert name() == first
    (tmp_path / "c.h").write_text("4\n")
    assert name() != first


def test_sources_name_their_targets():
    for target in build.GPU_TARGETS:
        names = [s.stem for s in build.sources(target)]
        assert {"quantize_mxfp4", "quantize_nvfp4", "bind_quantize", "library"} <= set(names)
    for source in [*build.HERE.glob("*.cu"), *build.HERE.glob("*.cpp")]:
        assert set(build._marks(source, "targets")) <= set(build.GPU_TARGETS), source


def test_without_nvcc_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(build.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr("sys.argv", ["build.py", "--targets", "sm_90a"])
    assert build.main() == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: no nvcc: install the CUDA toolkit 12.9 or newer, or set CUDA_HOME"
    ]


# -- provider --------------------------------------------------------------------------------------------------------


def test_a_cpu_only_torch_loads_the_library(nvcc):
    """The stable ABI: a library built with these headers loads without libtorch_cuda; its ops are there."""
    path = build.build(["sm_90a"])[0]
    code = (
        f"import torch; torch.ops.load_library({str(path)!r}); "
        "print(torch.ops.wush_sm_90a.transform_quantize.default._schema)"
    )
    run = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True)
    assert "bool swizzled) -> (Tensor codes, Tensor scales)" in run.stdout, run.stderr
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
    assert "libtorch_cpu" in needed and "libtorch_cuda" not in needed and "libcudart" not in needed


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(libraries, "DIRECTORIES", (tmp_path,))
    assert "compute capability 8.0" in cuda.unavailable((8, 0))
    assert cuda.unavailable((9, 0)).startswith("not built: `python csrc/build.py --targets sm_90a`")
    (tmp_path / "libwush_sm_120a.so").write_bytes(b"no library")
    reason = cuda.unavailable((9, 0))
    assert isinstance(reason, kernels.FixableReason) and "built for sm_120a, not for this GPU's sm_90a" in reason
    libraries.load.cache_clear()
    reason = cuda.unavailable((12, 0))
    assert isinstance(reason, kernels.FixableReason) and reason.startswith("libwush_sm_120a.so does not run here:")
    assert "\n" not in reason


def test_a_faulty_installation_is_one_warning(monkeypatch, caplog):
    """The warning names the provider in use and how to get the better one."""
    faulty = kernels.Provider("cuda", lambda c: kernels.FixableReason("built for sm_120a: build it"), dict)
    product = kernels.Implementation(lambda *args: None, lambda *args: None)
    works = kernels.Provider("triton", lambda c: None, lambda: {"fp4_linear": product})
    monkeypatch.setattr(kernels, "PROVIDERS", (faulty, works))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.delenv("WUSH_PROVIDER", raising=False)
    with caplog.at_level("WARNING", logger="wush_compile"):
        kernels.resolve.__wrapped__(0)
    assert [r.message for r in caplog.records] == ["cuda built for sm_120a: build it; used instead: triton"]


def test_without_a_driver_the_library_says_so(nvcc):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without an NVIDIA driver")
    build.build(["sm_90a"])
    libraries.load.cache_clear()
    with pytest.raises(RuntimeError, match="no NVIDIA driver"):
        cuda.load("sm_90a")


# -- quantizers, on a GPU --------------------------------------------------------------------------------------------

LAYOUTS = layouts.SCALE_LAYOUTS  # by `swizzled`
RULES = [
    ("mxfp4", rule, g) for rule in FORMATS["mxfp4"].scale_rules for g in ((3.0,) if rule == "paper" else (None, 0.7))
]
RULES += [
    ("nvfp4", rule, g) for rule in FORMATS["nvfp4"].scale_rules if rule in cuda.RULES for g in (None, 0.37, 512.0)
]
rules = pytest.mark.parametrize("format, rule, g", RULES)


@pytest.fixture
def library():
    reason = cuda.unavailable(torch.cuda.get_device_capability())
    if reason:
        pytest.skip(f"cuda {reason}")


def scalar(g):
    return None if g is None else torch.tensor([g], device=DEVICE)


def poison(*sizes):
    """The allocator gives the next tensors of these sizes memory full of 0xEE."""
    blocks = [torch.full((size,), 0xEE, dtype=torch.uint8, device=DEVICE) for size in sizes for _ in range(2)]
    del blocks


def assert_same(got, want, swizzled=False):
    if swizzled:
        want = want[0], layouts.swizzle_scales(want[1].flatten(0, -2))
    for name, a, b in zip(("codes", "scales"), got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        wrong = (a != b).sum().item()
        assert wrong == 0, f"{wrong} of {a.numel()} {name} differ, first at {(a != b).nonzero()[0].tolist()}"


def spread(m, k, dtype, seed=0):
    """Values over many octaves, with zeros of both signs, subnormals and rows of one value."""
    generator = torch.Generator().manual_seed(seed)
    octaves = torch.randint(-9, 9, (m, k // 16), generator=generator).float().repeat_interleave(16, 1)
    x = torch.randn(m, k, generator=generator) * torch.exp2(octaves)
    x[torch.rand(m, k, generator=generator) < 0.05] = 0
    x[torch.rand(m, k, generator=generator) < 0.05] *= -0.0
    if m > 3:
        x[1] = 0
        x[2] *= 2.0**-100 if dtype != torch.float16 else 2.0**-12
        x[3] = x[3].sign() * 3
    return x.to(dtype).to(DEVICE)


def whole(m, k, blocks, block, dtype, seed=0):
    """x and T of small integers: every order of summation gives the same fp32 sums."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-24, 25, (m, k), generator=generator).to(dtype)
    t = torch.randint(-3, 4, (blocks, block, block), generator=generator).to(dtype)
    return x.to(DEVICE), t.to(DEVICE)


@gpu
@rules
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("m, k", [(1, 32), (3, 96), (37, 576), (130, 1536), (257, 4096)])
def test_quantize_is_the_reference(library, format, rule, g, swizzled, m, k):
    for dtype in (torch.bfloat16, torch.float16):
        x = spread(m, k, dtype)
        want = ops._transform_quantize(x, None, scalar(g), format, rule)
        poison(want[0].numel(), want[1].numel(), layouts.swizzle_scales(want[1]).numel())
        assert_same(cuda.transform_quantize(x, None, scalar(g), format, rule, LAYOUTS[swizzled]), want, swizzled)


@gpu
def test_odd_nvfp4_widths(library):
    for k in (16, 48, 80, 336, 1040):
        for swizzled in (False, True):
            x, t = whole(19, k, k // 16, 16, torch.bfloat16)
            for transform in (None, t):
                want = ops._transform_quantize(x, transform, None, "nvfp4", "absmax")
                poison(want[0].numel(), want[1].numel(), layouts.swizzle_scales(want[1]).numel())
                assert_same(
                    cuda.transform_quantize(x, transform, None, "nvfp4", "absmax", LAYOUTS[swizzled]), want, swizzled
                )


@gpu
@both
@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("m, k", [(1, 256), (33, 768), (64, 1536), (300, 4096), (4100, 4096)])
def test_transform_quantize_is_the_reference(library, format, rule, shared, swizzled, m, k):
    block = FORMATS[format].group_size
    for dtype in (torch.bfloat16, torch.float16):
        x, t = whole(m, k, 1 if shared else k // block, block, dtype)
        want = ops._transform_quantize(x, t, None, format, rule)
        poison(want[0].numel(), want[1].numel(), layouts.swizzle_scales(want[1]).numel())
        assert_same(cuda.transform_quantize(x, t, None, format, rule, LAYOUTS[swizzled]), want, swizzled)


@gpu
@both
def test_every_rounding_of_e2m1(library, format):
    """Every bf16 value of one octave range against a group maximum that fixes the scale: all ties, both signs."""
    group = FORMATS[format].group_size
    values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[(values >= 2.0**-6) & (values <= 8)]
    values = torch.cat((values, -values))
    x = torch.full((-(-values.numel() // (group - 1)), group), 6.0, dtype=torch.bfloat16)
    x[:, 1:].reshape(-1)
    flat = torch.zeros(x.shape[0] * (group - 1), dtype=torch.bfloat16)
    flat[: values.numel()] = values
    x[:, 1:] = flat.view(x.shape[0], -1)
    x = x.to(DEVICE)
    for g in (None, 0.37):
        got = cuda.transform_quantize(x, None, scalar(g), format, "absmax")
        assert_same(got, ops._transform_quantize(x, None, scalar(g), format, "absmax"))


@gpu
@both
def test_transform_of_real_numbers_differs_at_ties_only(library, format):
    """The order of an fp32 sum shows where a value lies within its error of a tie."""
    block, m, k = FORMATS[format].group_size, 2048, 4096
    x = torch.randn(m, k, device=DEVICE).bfloat16()
    t = torch.linalg.qr(torch.randn(k // block, block, block, device=DEVICE))[0].bfloat16()
    got = cuda.transform_quantize(x, t, None, format, "absmax")
    want = ops._transform_quantize(x, t, None, format, "absmax")
    share = (got[0] != want[0]).float().mean().item()
    scales = (got[1] != want[1]).float().mean().item()
    print(f"{format}: {share:.1e} of the code bytes, {scales:.1e} of the scales differ")
    assert share < 2e-5 and scales < 2e-5


@gpu
@both
@pytest.mark.parametrize("transform", [False, True])
def test_not_finite_values_stay_in_their_groups(library, format, transform):
    group = FORMATS[format].group_size
    x, t = whole(70, 512, 512 // group, group, torch.bfloat16)
    x[5, 3], x[6, 100], x[7, 511], x[66, 40] = float("nan"), float("inf"), -float("inf"), float("nan")
    x[68, 0], x[68, 17] = float("inf"), float("nan")
    t = t if transform else None
    for rule in ("absmax", "mse"):
        got = cuda.transform_quantize(x, t, None, format, rule)
        assert_same(got, ops._transform_quantize(x, t, None, format, rule))
        assert (got[1] == (0xFF if format == "mxfp4" else 0x7F)).sum() == (5 if format == "mxfp4" else 6)


@gpu
def test_all_e4m3_scales_round_as_the_reference(library):
    """Every rounding and every tie of the scale."""
    amax = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)[: 2**15 - 128]
    x = torch.zeros(amax.numel(), 16, device=DEVICE, dtype=torch.bfloat16)
    x[:, 3], x[:, 9] = amax.to(DEVICE), -amax.to(DEVICE) / 3
    for g in (None, 0.37, 2.0**-7):
        for rule in ("absmax", "mse"):
            for width in (16, 256):
                rows = x[: amax.numel() // 16 * 16].reshape(-1, width)
                assert_same(
                    cuda.transform_quantize(rows, None, scalar(g), "nvfp4", rule),
                    ops._transform_quantize(rows, None, scalar(g), "nvfp4", rule),
                )


@gpu
@both
def test_strided_rows_and_leading_dimensions(library, format):
    wide = spread(40, 2048, torch.bfloat16)
    views = [
        wide[:, 512:1536].view(5, 8, 1024),
        wide[:, 8:1032],
        wide[:, 3:1027],
        wide.view(5, 8, 2048)[:, ::2],
        wide[::3],
        wide[7],
        wide.view(5, 8, 2048).transpose(0, 1),
    ]
    for x in views:
        assert_same(
            cuda.transform_quantize(x, None, None, format, "absmax"),
            ops._transform_quantize(x.contiguous(), None, None, format, "absmax"),
        )
    empty = cuda.transform_quantize(wide[:0], None, None, format, "absmax")
    assert empty[0].shape == (0, 1024)
    with pytest.raises(RuntimeError, match="not a multiple"):
        cuda.transform_quantize(wide[:, :24], None, None, format, "absmax")


@gpu
@both
@pytest.mark.parametrize("m, k", [(1, 256), (37, 1536), (515, 4096)])
def test_silu_mul_is_the_reference(library, format, m, k):
    block = FORMATS[format].group_size
    for dtype in (torch.bfloat16, torch.float16):
        both_halves = spread(m, 2 * k, dtype)
        gate, up = both_halves[:, :k], both_halves[:, k:]
        want = fused_ops._silu_mul_transform_quantize(gate, up, None, None, format, "absmax")
        assert_same(cuda.silu_mul_transform_quantize(gate, up, None, None, format, "absmax"), want)
        t = torch.eye(block, dtype=dtype, device=DEVICE).expand(k // block, -1, -1).contiguous()
        for swizzled in (False, True):  # with the unit matrix nothing is summed but zeros
            got = cuda.silu_mul_transform_quantize(gate, up, t, None, format, "absmax", LAYOUTS[swizzled])
            values = torch.nn.functional.silu(gate) * up
            assert_same(got, ops._transform_quantize(values, t, None, format, "absmax"), swizzled)


@gpu
@both
@pytest.mark.parametrize("gain", fused_ops.GAINS)
@pytest.mark.parametrize("m, k", [(1, 256), (37, 1536), (515, 4096)])
def test_rms_norm_is_the_reference(library, format, gain, m, k):
    """Rows whose sum of squares is the same in every order are exact; else the last bit of a norm can show."""
    x = torch.randint(-4, 5, (m, k), generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    weight = None if gain == "none" else torch.randn(k, device=DEVICE).bfloat16()
    if weight is not None:
        weight[::5], weight[1::7] = 0.0, -0.0
    for eps, pointer in ((1e-5, None), (0.0, torch.tensor(1e-5, device=DEVICE))):
        args = (weight, eps, pointer, gain, None, None, format, "absmax")
        assert_same(cuda.rms_norm_transform_quantize(x, *args), fused_ops._rms_norm_transform_quantize(x, *args))
    real = torch.randn(m, k, device=DEVICE).bfloat16()
    got = cuda.rms_norm_transform_quantize(real, *args)
    want = fused_ops._rms_norm_transform_quantize(real, *args)
    share = (got[0] != want[0]).float().mean().item()
    print(f"{format} {gain} {m}x{k}: {share:.1e} of the code bytes differ")
    assert share < 1e-3


@gpu
@both
@pytest.mark.parametrize("gain", fused_ops.GAINS)
@pytest.mark.parametrize("m, k", [(1, 256), (37, 1536), (515, 4096)])
def test_add_rms_norm_is_the_reference(library, format, gain, m, k):
    """The norm reads the unrounded sum. Halves of integers have exact sums of squares, and sums that bf16 rounds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (m, k), generator=generator).to(DEVICE, torch.bfloat16)
    residual = torch.randint(-4, 5, (m, k), generator=generator).to(DEVICE, torch.bfloat16)
    x[:, ::3], residual[:, ::3] = 256, 1  # 257 has no bf16
    weight = None if gain == "none" else torch.randn(k, device=DEVICE).bfloat16()
    if weight is not None:
        weight[::5], weight[1::7] = 0.0, -0.0
    t = torch.eye(FORMATS[format].group_size, dtype=x.dtype, device=DEVICE).unsqueeze(0)
    for eps, pointer in ((1e-5, None), (0.0, torch.tensor(1e-5, device=DEVICE))):
        for transform in (None, t):  # with the unit matrix nothing is summed but zeros
            args = (weight, eps, pointer, gain, transform, None, format, "absmax")
            got = cuda.add_rms_norm_transform_quantize(x, residual, *args)
            want = fused_ops._add_rms_norm_transform_quantize(x, residual, *args)
            assert_same(got[:2], want[:2])
            assert torch.equal(got[2], want[2]) and got[2].is_contiguous()
    args = (weight, 1e-5, None, gain, None, None, format, "absmax")
    wide = torch.randn(2, m, 2 * k, device=DEVICE).bfloat16()
    got = cuda.add_rms_norm_transform_quantize(wide[0, :, :k], wide[1, :, k:], *args)
    want = fused_ops._add_rms_norm_transform_quantize(wide[0, :, :k], wide[1, :, k:], *args)
    share = (got[0] != want[0]).float().mean().item()
    print(f"{format} {gain} {m}x{k}: {share:.1e} of the code bytes differ")
    assert share < 1e-3 and torch.equal(got[2], want[2])


@gpu
def test_wrong_arguments_are_errors(library):
    x = spread(4, 64, torch.bfloat16)
    for t in (torch.zeros(3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.float16), torch.zeros(2, 16, 16)):
        with pytest.raises(RuntimeError):
            cuda.transform_quantize(x, t.to(DEVICE), None, "mxfp4", "absmax")
    with pytest.raises(RuntimeError, match="another device|CUDA"):
        cuda.transform_quantize(x, torch.zeros(2, 32, 32, dtype=torch.bfloat16), None, "mxfp4", "absmax")
    with pytest.raises(RuntimeError, match="residual differ in shape"):
        cuda.add_rms_norm_transform_quantize(x, x[:3], None, 1e-5, None, "none", None, None, "mxfp4", "absmax")
    with pytest.raises(RuntimeError, match="one fp32 number"):
        cuda.transform_quantize(x, None, torch.ones(2, device=DEVICE), "mxfp4", "absmax")


@gpu
@both
def test_in_a_cuda_graph_and_on_another_stream(library, format):
    x = spread(33, 512, torch.bfloat16)
    want = cuda.transform_quantize(x, None, None, format, "absmax")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures a stream of its own
        got = cuda.transform_quantize(x, None, None, format, "absmax")
    for t in got:
        t.zero_()
    graph.replay()
    assert_same(got, want)
