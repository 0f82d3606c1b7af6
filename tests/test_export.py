"""`torch.export` of quantized models: fused in place, saved and loaded, packaged without Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import branches
from models import quantized, tokens
from torch import nn
from torch.export import Dim

import wush_compile as wc
from wush_compile.formats import FORMATS
from wush_compile.trace import count_ops, print_graph

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
    assert [s.step for s in log.graphs[0].snapshots] == ["incoming", *(p.__name__ for p in wc.passes.EXECUTION)]
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
def test_the_arithmetic_that_is_inlined_is_the_ops(format, rule):
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


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """What `examples/export_aoti.py` writes: (path, its output)."""
    folder = tmp_path_factory.mktemp("package")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run([sys.executable, EXAMPLES / "export_aoti.py", folder / "model.pt2"], env=environment,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder / "model.pt2", done.stdout


ONLY_TORCH = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
print(*model(torch.tensor([[int(t) for t in sys.argv[2:]]])).argmax(-1)[0].tolist())
assert not any(name.startswith(("wush", "transformers")) for name in sys.modules)
assert not any(op.startswith("wush") for op in torch._C._dispatch_get_all_op_names())
"""


def test_a_package_runs_in_a_process_that_imports_only_torch_and_in_cpp(package, tmp_path):
    path, printed = package
    assert printed.strip().endswith("largest difference from eager 0")
    ids = ["12", "7", "42", "3", "3"]
    python = subprocess.run([sys.executable, "-c", ONLY_TORCH, path, *ids], capture_output=True, text=True, cwd=tmp_path)
    assert python.returncode == 0, python.stderr
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", EXAMPLES / "export_aoti", "-B", tmp_path / "build", prefix],
                    ["cmake", "--build", tmp_path / "build"]):
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout + built.stderr
    cpp = subprocess.run([tmp_path / "build" / "host", path, *ids], capture_output=True, text=True)
    assert cpp.returncode == 0, cpp.stderr
    assert cpp.stdout.split() == python.stdout.split() and len(cpp.stdout.split()) == len(ids)
