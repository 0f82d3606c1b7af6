"""These tests run where vLLM is installed: `make test-vllm` sets up an environment of its own."""

import importlib.util
import os

import pytest

# Read when vLLM is imported. The engine runs in this process, so that its errors and its compile can be seen.
if importlib.util.find_spec("vllm") is not None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
    )


@pytest.fixture
def cache_root(monkeypatch, tmp_path):
    """vLLM's cache of compiled graphs in a folder of the test's own."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    return tmp_path / "cache"
