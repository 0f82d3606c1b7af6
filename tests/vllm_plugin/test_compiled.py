"""Our passes run inside vLLM's compile, change no number, and enter its cache keys."""

import logging
import re

import pytest

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
from served import agreement, checkpoint, greedy

from wush_compile.passes import pipeline
from wush_compile.vllm.passes import ExecutionPasses


@pytest.mark.parametrize("settings", [{}, {"format": "nvfp4"}], ids=["mxfp4", "nvfp4"])
def test_compiled_in_fp32(tmp_path, cache_root, caplog, settings):
    directory = checkpoint(tmp_path / "checkpoint", **settings)
    with caplog.at_level(logging.INFO, logger="wush_compile"):
        rows = greedy(directory, enforce_eager=False)
    found = agreement(directory, rows)
    assert found.close, found
    [counts] = {record.message for record in caplog.records if record.message.startswith("execution passes")}
    assert "fuse_activation: 2" in counts and "fuse_norm: 4" in counts  # of two layers: all


def test_compiled_in_bf16_takes_the_sums_in(tmp_path, cache_root, caplog):
    directory = checkpoint(tmp_path / "checkpoint", kind="llama")
    with caplog.at_level(logging.INFO, logger="wush_compile"):
        rows = greedy(directory, enforce_eager=False, dtype="bfloat16")
    assert len(rows) == 6
    [counts] = {record.message for record in caplog.records if record.message.startswith("execution passes")}
    assert "fuse_activation: 2" in counts and "fuse_norm: 4" in counts
    assert re.search(r"add_rms_norm_transform_quantize: 3\b", counts), counts  # the first norm has no sum


def test_passes_enter_the_cache_keys(monkeypatch):
    one = ExecutionPasses().uuid()
    assert isinstance(one, str) and one == ExecutionPasses().uuid()
    assert ExecutionPasses(ExecutionPasses()).uuid() != one
    monkeypatch.setattr(pipeline, "EXECUTION", pipeline.EXECUTION[1:])
    assert ExecutionPasses().uuid() != one
