"""A sample of `benchmarks/coverage.py`, which walks every architecture of transformers: some of each kind, tiny."""

import sys
from pathlib import Path

import pytest

from wush_compile.calibration.verify import EQUAL, NOISE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import coverage
import tiny_models

SAMPLE = ("bert", "dia", "swin", "qwen3_vl_vision", "nn.TransformerEncoder")
# torch's encoder attends by a kernel of its own in eager mode, which no trace has.
DIFFERS = {"nn.TransformerEncoder": NOISE}


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_passes_every_column(name):
    row = {}
    coverage.measure(name, ("quantized", "saved", "export"), row.update)
    assert row["done"] and coverage.passed(row), row
    assert row["equal"] == DIFFERS.get(name, EQUAL) and row["linears_quantized"] > 0


def test_a_walk_goes_on_where_it_stopped_and_keeps_what_failed(tmp_path, capfd):
    kept = tmp_path / "rows.json"
    rows = {}
    coverage.walk(["bloom"], ("eager",), 1, 60, 4 * 2**30, rows.__setitem__)
    assert rows["bloom"]["eager"] is True and rows["bloom"]["class"] == "BloomForCausalLM"
    coverage.write_json(kept, {"rows": rows})
    coverage.main(["--out", str(kept), "--only", "bloom", "--columns", "eager"])
    assert "1 walked, 1 run, 0 pass" in capfd.readouterr().out


def test_a_walk_knows_every_model_type():
    found = tiny_models.architectures()
    assert {"llama", "t5", "whisper", "vit", "llava", "nn.Transformer"} <= set(found)
    assert len(found) > 300
