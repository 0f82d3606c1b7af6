"""The printer, the log of passes, `explain(view="compiled")`, and the examples that show them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import quantized
from test_backend import mlp, rows

import wush_compile as wc
from wush_compile.backend import preview
from wush_compile.errors import ConfigError
from wush_compile.graphs.printing import print_graph, readable_name
from wush_compile.passes import pipeline as passes

EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = ["incoming", *(p.__name__ for p in passes.EXECUTION)]


@pytest.mark.parametrize(
    "name, path",
    [
        (
            "L_self_modules_model_modules_layers_modules_0_modules_mlp_modules_up_proj_parameters_weight_",
            "model.layers.0.mlp.up_proj.weight",
        ),
        ("l_self_modules_q_proj_group_0_buffers_weight_packed_", "q_proj.group.weight_packed"),
        ("p_model_norm_weight", "model_norm_weight"),
    ],
)
def test_inputs_get_readable_names(name, path):
    assert readable_name(name) == path


PRINT = """
import sys
sys.path.insert(0, sys.argv[1])
from test_trace import dynamic_text
print(dynamic_text())
"""


def dynamic_text() -> str:
    torch._dynamo.reset()
    x = rows(2, 5)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    return preview(mlp(layers=2), x).text()


def test_the_text_is_the_same_in_every_process():
    for _ in range(2):  # symbols and names count up with what was traced before
        here = dynamic_text()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT, Path(__file__).parent], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == here.strip()
    assert "[s0, s1, 64]" in here and not re.search(r"0x[0-9a-f]{4}", here)


def test_explain_shows_the_compiled_layer():
    model = quantized()
    text = wc.explain(model, view="compiled")
    before, after = text.split("\nbefore\n")[1].split("\n\nafter\n")
    assert before.count("= wush.transform_quantize(") == 7 and before.count("= wush.fp4_linear(") == 7
    assert after.count("transform_quantize(") == 4 and after.count("= wush.fp4_linear(") == 4
    assert ", mlp.down_proj.group.weight_packed, " in after and "layers.1" not in after
    with pytest.raises(ConfigError, match="did you mean 'compiled'"):
        wc.explain(model, view="compile")


def test_the_command_line_shows_a_layer_after_a_pass(tmp_path):
    from typer.testing import CliRunner

    from wush_compile.cli import app

    wc.save(quantized(), tmp_path / "model")
    run = CliRunner().invoke(app, ["explain", str(tmp_path / "model"), "--graph", "layer.1", "--after", "fuse_norm"])
    assert run.exit_code == 0, run.output
    assert run.output.count("rms_norm_transform_quantize(") == 2 and "silu_mul_transform" not in run.output
    assert "self_attn.q_proj.group.weight_packed" in run.output and "layers.0" not in run.output
    run = CliRunner().invoke(app, ["explain", str(tmp_path / "model"), "--after", "fuse_norms"])
    assert run.exit_code == 1 and "fuse_norm" in run.output


def test_a_log_sees_every_step_and_saves_it(tmp_path, capsys):
    torch._dynamo.reset()
    model = mlp()
    with torch.no_grad(), wc.trace_graphs() as log:
        torch.compile(model, backend="wush")(rows(2, 5))
    (graph,) = log.graphs
    assert [s.step for s in graph.snapshots] == ["dynamo", *STEPS]
    assert graph["incoming"].counts["transform_quantize"] == 3 and graph["cse"].counts["transform_quantize"] == 2
    assert graph["cleanup"].counts == {
        "rms_norm_transform_quantize": 1,
        "silu_mul_transform_quantize": 1,
        "fp4_linear": 2,
    }
    assert [k.split()[-1] for k in graph.kernels if "wush" in k] == [
        "wush.rms_norm_transform_quantize",
        "wush.fp4_linear",
        "wush.silu_mul_transform_quantize",
        "wush.fp4_linear",
    ]
    log.print(after="cleanup")
    assert "wush.silu_mul_transform_quantize(" in capsys.readouterr().out
    log.save(tmp_path)
    names = sorted(p.name for p in (tmp_path / "graph0").iterdir())
    assert names == [f"{i:02d}_{s}.txt" for i, s in enumerate(["dynamo", *STEPS])] + ["kernels.txt"]
    (saved,) = (tmp_path / "graph0").glob("*_cse.txt")
    assert saved.read_text().splitlines()[1:] == graph["cse"].text().splitlines()
    with pytest.raises(KeyError, match="the steps are"):
        graph["fuse_everything"]


def test_foreign_graphs_print_too():
    graph = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())).graph
    assert "return" in print_graph(graph)


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("inspect_graphs.py", ["steps"], "wush.rms_norm_transform_quantize("),
        ("compile_generate.py", [], "tokens of eager: True"),
    ],
)
def test_examples_run(name, arguments, expected, tmp_path):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
