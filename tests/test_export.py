"""`torch.export` of quantized models: fused in place, saved and loaded, packaged without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import branches, emulates_rounding, quantize
from models import pair, pair_rows, quantized, tokens
from torch import nn
from torch.export import Dim

import wush_compile as wc
from wush_compile.formats import FORMATS
from wush_compile.graphs.printing import count_ops, print_graph
from wush_compile.passes import pipeline as passes

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPES = [(2, 9), (3, 7), (1, 1), (1, 40)]


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def export(model, **options):
    any_size = {0: Dim.AUTO, 1: Dim.AUTO}
    with torch.no_grad():
        return torch.export.export(model, (tokens(2, 9),), dynamic_shapes=(any_size,), **options)


@pytest.fixture(scope="module", params=[("llama", "nvfp4"), ("gemma3", "mxfp4")], ids=["llama", "gemma3"])
def model(request):
    return Logits(quantized(*request.param, layers=1))


def assert_same_logits(program, model):
    run = program.module() if isinstance(program, torch.export.ExportedProgram) else program
    with torch.no_grad():
        for shape in SHAPES:
            ids = tokens(*shape)
            assert torch.equal(run(ids), model(ids)), shape


def test_fuse_in_place_keeps_signature_and_bits(model, tmp_path):
    program = export(model)
    signature = str(program.graph_signature)
    assert count_ops(program.graph) == {"transform_quantize": 7, "fp4_linear": 7}
    with wc.trace_graphs() as log:
        assert wc.fuse(program) is program
    counts = count_ops(program.graph)
    assert counts["fp4_linear"] == 4 and counts["rms_norm_transform_quantize"] == 2 and sum(counts.values()) == 8
    assert str(program.graph_signature) == signature
    assert [s.step for s in log.graphs[0].snapshots] == ["incoming", *(p.__name__ for p in passes.EXECUTION)]
    assert_same_logits(program, model)

    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert print_graph(loaded.graph) == print_graph(program.graph)
    assert_same_logits(loaded, model)

    again = print_graph(wc.fuse(program).graph)
    assert again == print_graph(loaded.graph)


def test_inlined_programs_hold_no_op_of_ours_and_the_same_bits(model):
    program = wc.fuse(export(model), inline=True)
    assert not count_ops(program.graph)
    assert_same_logits(program, model)


@pytest.mark.parametrize("format, rule", [(f.name, rule) for f in FORMATS.values() for rule in f.scale_rules])
def test_inlined_arithmetic_equals_the_ops(format, rule):
    settings = {} if rule != "paper" else {"weight_scale_rule": "paper"}
    model, x = branches(torch.bfloat16, format=format, activation_scale_rule=rule, transform="hadamard", **settings)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    program = wc.fuse(program, inline=True)
    assert not count_ops(program.graph)
    for lead in ((5, 7), (1, 1), (0, 3)):
        x = torch.randn(*lead, 64).bfloat16()
        with torch.no_grad():
            assert torch.equal(program.module()(x), model(x))


def test_fuse_leaves_an_unquantized_program_alone():
    program = torch.export.export(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8), nn.SiLU()), (torch.randn(2, 8),))
    before = print_graph(program.graph)
    assert print_graph(wc.fuse(program).graph) == before


def make_package(folder: Path, *arguments: str) -> tuple[Path, str]:
    """Runs `examples/export_aoti.py`: (path of the package, printed output)."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "export_aoti.py", folder / "model.pt2", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return folder / "model.pt2", done.stdout


ONLY_TORCH = """
import sys
for name in ("wush_compile", "transformers", "triton"):      # torch itself imports triton where it is installed
    sys.modules[name] = None
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
ids = torch.tensor([[int(t) for t in sys.argv[3:]]], device=sys.argv[2])
print(*model(ids).argmax(-1)[0].tolist())
assert not any(op.startswith("wush") for op in torch._C._dispatch_get_all_op_names())
"""
IDS = ["12", "7", "42", "3", "3"]


def run_only_torch(path: Path, device: str) -> list[str]:
    """The most likely tokens, from a process that imports only torch."""
    python = subprocess.run(
        [sys.executable, "-c", ONLY_TORCH, path, device, *IDS], capture_output=True, text=True, cwd=path.parent
    )
    assert python.returncode == 0, python.stderr
    return python.stdout.split()


def run_cpp(host: Path, path: Path) -> list[str]:
    cpp = subprocess.run([host, path, *IDS], capture_output=True, text=True)
    assert cpp.returncode == 0, cpp.stderr
    return cpp.stdout.split()


def test_a_package_runs_in_a_process_that_imports_only_torch_and_in_cpp(tmp_path):
    path, printed = make_package(tmp_path)
    assert float(printed.split()[-1]) <= (0 if emulates_rounding() else 0.1), printed
    python = run_only_torch(path, "cpu")
    assert len(python) == len(IDS)
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", EXAMPLES / "export_aoti", "-B", tmp_path / "build", prefix],
        ["cmake", "--build", tmp_path / "build"],
    ):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    assert run_cpp(tmp_path / "build" / "host", path) == python


# -- GPU -------------------------------------------------------------------------------------------------------------


def targets(program) -> list[str]:
    """What a program and the branches in it call."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule))
    return [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]


def packaged(model, path: Path, **config):
    """(the program that was packaged, the package)."""
    example, any_rows = (pair_rows(5).cuda(),), ({0: Dim.AUTO},)
    with torch.no_grad(), torch._inductor.config.patch(config):
        program = wc.fuse(torch.export.export(model, example, dynamic_shapes=any_rows), inline=True)
        assert not count_ops(program.graph)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return program, torch._inductor.aoti_load_package(path)


def assert_close_to_eager(package, model, equal: tuple[int, ...]):
    """For any number of rows; the bits of eager where the band's kernel is the one that eager chooses."""
    with torch.no_grad():
        for n in (1, 2, 3, 4, 5, 16, 32, 64, 100, 128, 200, 256, 257, 300, 600, 2000):
            x = pair_rows(n).cuda()
            expected, actual = model(x), package(x)
            if n in equal:
                assert torch.equal(actual, expected), n
            difference = (actual - expected).float().norm() / expected.float().norm()
            assert difference < 0.01, (n, difference)
        assert package(pair_rows(0).cuda()).shape == (0, 256)


LAUNCH = "triton_kernel_wrapper_functional"


@pytest.mark.gpu
@pytest.mark.parametrize("format, rule", [("mxfp4", "mse"), ("nvfp4", "mse")])
def test_gpu_packages_hold_triton_kernels_for_every_number_of_rows(format, rule, shared_libstdcxx, tmp_path):
    model = pair(format=format, activation_scale_rule=rule).cuda()
    program, package = packaged(model, tmp_path / "pair.pt2")
    calls = targets(program)
    assert calls.count(LAUNCH) > 10 and "aten.linear.default" not in calls
    assert "aten.amax.default" not in calls  # the largest scales of weights are constants
    assert_close_to_eager(package, model, (1, 2, 3, 4, 5, 16, 32, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("format, product", [("mxfp4", "aten._scaled_mm.default"), ("nvfp4", "aten.mm")])
def test_gpu_packages_hold_the_librarys_product(format, product, shared_libstdcxx, tmp_path):
    """In a branch; PyTorch before 2.13 compiles branches if it reuses no buffers."""
    model = pair(format=format, activation_scale_rule="mse").cuda()
    program, package = packaged(model, tmp_path / "pair.pt2", allow_buffer_reuse=False)
    calls = targets(program)
    assert "cond" in calls and any(call.startswith(product) for call in calls)
    assert_close_to_eager(package, model, (1, 2, 3, 4, 5, 16, 32, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int8"])
@pytest.mark.parametrize("activation", ["fp8", None])
def test_gpu_packages_of_activations_of_8_and_16_bits(format, activation, shared_libstdcxx, tmp_path):
    model = pair(format=format, activation_format=activation).cuda()
    program, package = packaged(model, tmp_path / "pair.pt2", allow_buffer_reuse=False)
    assert targets(program).count(LAUNCH) > 4
    assert_close_to_eager(package, model, (1, 2, 3, 4, 5, 16, 32, 64) if format != "int8" else ())


@pytest.mark.gpu
def test_a_gpu_package_runs_in_a_process_that_imports_only_torch_and_in_cpp(shared_libstdcxx, tmp_path):
    path, printed = make_package(tmp_path, "cuda")
    assert float(printed.split()[-1]) < 0.05, printed  # Inductor's norm and activation may flip a code
    python = run_only_torch(path, "cuda")
    assert len(python) == len(IDS)
    from torch.utils import cpp_extension

    command = [os.environ["CXX"], "-std=c++20", EXAMPLES / "export_aoti" / "host.cpp", "-o", tmp_path / "host"]
    command += [f"-I{p}" for p in cpp_extension.include_paths()]
    command += [flag for p in cpp_extension.library_paths() for flag in (f"-L{p}", f"-Wl,-rpath,{p}")]
    command += ["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda", "-ltorch", "-ltorch_cpu", "-lc10"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert run_cpp(tmp_path / "host", path) == python


class Masked(nn.Module):
    """A mask made by vmap, as transformers makes some, in front of a linear."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        mask = torch.vmap(lambda i: i + torch.arange(x.shape[1]))(torch.arange(x.shape[0]))
        return self.linear(nn.functional.gelu(x * mask.unsqueeze(-1)).reshape(-1, 64))


def test_passes_keep_the_levels_of_vmap():
    x = torch.randn(3, 8, 64)
    model = quantize(Masked(), x, transform="hadamard")
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        assert any("vmap" in node.name for node in program.graph.nodes)
        assert torch.equal(wc.fuse(program).module()(x), model(x))


class Overlapping(nn.Module):
    """Reads one of two siblings by places in memory, as Longformer's chunks do."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        left, right = self.left(x), self.right(x).transpose(0, 1)
        return left.as_strided((3, 8, 64), (256, 64, 1)), right.as_strided((3, 8, 64), (64, 192, 1))


def test_what_as_strided_reads_lies_where_it_did():
    x = torch.randn(8, 3, 64)
    model = quantize(Overlapping(), x, transform="hadamard")
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        expected = model(x)
        fused = wc.fuse(program)
        assert count_ops(fused.graph)["fp4_linear"] == 1
        assert all(map(torch.equal, fused.module()(x), expected))
