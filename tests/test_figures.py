"""The numbers that README.md and docs/ report are those of benchmarks/results (`make figures` writes them)."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import figure_tables
import figures


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """README.md and docs/ in a folder of their own."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path


def check(root: Path) -> int:
    return figures.main(["--check", "--root", str(root)])


def test_documents_say_what_was_measured(capsys):
    assert check(ROOT) == 0, f"run make figures:\n{capsys.readouterr().out}"


@pytest.mark.parametrize("document", ["README.md", "docs/notebook/linear_kernel.md", "docs/notebook/accuracy.md"])
def test_a_changed_digit_is_found(copy, document, capsys):
    path, digit = copy / document, re.compile(r"\d(?=[^\d]*<!-- /figures -->)")
    text = path.read_text()
    changed, count = digit.subn(lambda match: str((int(match[0]) + 1) % 10), text, count=1)
    assert count == 1
    path.write_text(changed)
    assert check(copy) == 1
    assert document in capsys.readouterr().out
    assert path.read_text() == changed  # --check writes nothing
    figures.main(["--root", str(copy)])
    assert path.read_text() == text


def test_a_plot_of_other_data_is_found(copy, capsys):
    path = copy / figures.PLOT
    path.write_text(path.read_text().replace(figures.digest(), "linear_h200 0123456789abcdef"))
    assert check(copy) == 1
    assert "speedup.svg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- figures: nothing -->1<!-- /figures -->", "no figure 'nothing'"),
        ("<!-- figures: files -->", "not closed"),
        ("a\n<!-- figures: weights end_to_end_h100 bf16 -->1<!-- /figures -->", "begins a line"),
    ],
)
def test_a_marker_that_cannot_be_written_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        figures.written(text)


def test_halves_round_up_once():
    assert figure_tables.shown(1.335, 2) == "1.34"
    assert figure_tables.shown(0.5) == "1"
    assert figure_tables.shown(2.5) == "3"


@pytest.mark.parametrize("path", sorted(figure_tables.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    result, documents = json.loads(path.read_text()), [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert list(result)[:3] == ["device", "date", "command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"])
    assert all((ROOT / script).exists() for script in re.findall(r"benchmarks/\w+\.py", result["command"]))
    assert any(path.name in document.read_text() for document in documents), "no document cites it"
