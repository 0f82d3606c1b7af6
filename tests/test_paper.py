"""The paper's tables and figures: from the results that are here, and the table of tasks on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "paper"), str(ROOT / "benchmarks")]

import local_task
import published
import tables
import task_table
from test_tasks import folder, needs_harness, score, tiny, without_eos  # noqa: F401

from wush_compile.baselines import METHODS
from wush_compile.evaluation.task_file import TaskFile


def test_make_writes_every_table_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, ROOT / "paper" / "make.py", "--out", tmp_path], check=True, cwd=ROOT)
    page = (tmp_path / "report.md").read_text()
    for title in (
        *(f"Table {i}" for i in (1, 4, 5, 6, 7)),
        "Tables 2 and 3",
        *(f"Figure {i}" for i in (1, 2, 4, 5, 6)),
    ):
        assert f"## {title}" in page
    for table in tables.all_tables().values():
        named = [s for s in table.sources if s.endswith(".json")]
        assert all((tables.RESULTS / name).is_file() for name in named)
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert json.loads((tmp_path / "table7.json").read_text())["rows"] and (tmp_path / "figure1.svg").is_file()


def test_storage_is_the_papers_table_7():
    """Its percents, from the dimensions of its models, with a transform a linear."""
    for model, theirs in published.STORAGE.items():
        own = [tables.storage(tables.SHAPES[model], group, shared=False) for group in (32, 16)]
        assert [round(v, 1) for v in own] == list(theirs), model


def test_published_rows_are_methods_that_exist():
    for rows in published.TASKS.values():
        for format, method in rows:
            assert method in METHODS and format in METHODS[method].formats


def test_recovery_is_a_mean_over_seeds_with_their_spread(tmp_path):
    file = TaskFile(tmp_path / "r.json", {"model": "Qwen3-8B"})
    values = {
        "reference": [1, 1, 1, 0],
        "mxfp4 rtn 0": [1, 0, 0, 0],
        "mxfp4 rtn 1": [1, 1, 0, 0],
        "nvfp4 gptq 0": [1] * 4,
    }
    for run, answers in values.items():
        file.run(run)
        file.put(run, "t", [score(answers)])
    file.run("mxfp4 gptq 0")  # begun, not finished
    lines = {(line["format"], line["method"]): line for line in task_table.rows(file.runs)}
    rtn = lines["mxfp4", "rtn"]
    assert set(lines) == {("reference", "-"), ("mxfp4", "rtn"), ("nvfp4", "gptq")}
    assert rtn["average"] == 37.5 and rtn["recovery"] == pytest.approx(50) and rtn["seeds"] == 2
    assert rtn["spread"] == pytest.approx(100 / 3 / 2**0.5)
    shown = task_table.shown(json.loads((tmp_path / "r.json").read_text()))
    assert "| MXFP4 | RTN | 37.50 | 37.50 | 50.00 ± 23.57 | 93.74 |" in shown


def test_the_local_task_has_the_right_continuation_among_its_choices():
    paragraphs = [" ".join(f"w{i}x{j}" for j in range(55)) for i in range(9)]
    found = local_task.items("\n".join(["= Title =", *paragraphs, "too short"]))
    assert len(found) == 9 and found == local_task.items("\n".join(["= Title =", *paragraphs, "too short"]))
    for item in found:
        right = item["choices"][item["answer"]]
        assert any(f"{item['context']} {right}" in p for p in paragraphs) and len(set(item["choices"])) == 4
    assert len({item["answer"] for item in found}) > 1


def test_a_reference_without_a_point_has_no_recovery(tmp_path):
    file = TaskFile(None, {"model": "x"})
    for run in ("reference", "mxfp4 rtn 0", "mxfp4 rtn 1"):
        file.run(run)
        file.put(run, "t", [score([0, 0])])
    assert task_table.rows(file.runs)[1]["recovery"] is None
    assert "| 0.00 | 0.00 |  |" in task_table.shown({"model": "x", "runs": file.runs})


@needs_harness
def test_the_command_prints_the_table_of_a_model(tiny, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("the quick brown fox jumps over the lazy dog, " * 60)
    options = ["--tasks", "wush_sums", "--task-dir", folder, "--out", out, "--device", "cpu", "--count", 4]
    options += ["--window", 64, "--seeds", 0, 1, "--formats", "mxfp4", "--methods", "rtn", "quarot"]
    monkeypatch.setattr(sys, "argv", ["task_table.py", str(tiny), "--calibration", str(text), *map(str, options)])
    task_table.main()
    table = capsys.readouterr().out.rsplit("| format", 1)[1]
    assert "| MXFP4 | RTN |" in table and "| MXFP4 | QuaRot, GPTQ |" in table and "nothing of it stands beside" in table
    assert len(json.loads(out.read_text())["runs"]) == 5
    before = out.read_text()
    task_table.main()  # everything is there: nothing runs
    assert out.read_text() == before
