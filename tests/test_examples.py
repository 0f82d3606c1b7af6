"""The examples run unchanged, and stay short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    "name, says",
    [
        ("quantize_llm.py", "the loaded model generates the same tokens"),
        ("quantize_any_module.py", "GPTQ WUSH: relative error of the output"),
    ],
)
def test_example_runs(name, says):
    result = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout and "quantized: " in result.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
