"""Two processes on the CPU, by gloo: the ranks' shares, or the stages, give what the whole gives."""

import pytest

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
from served import agreement, checkpoint, greedy_apart


@pytest.mark.parametrize("settings", [{}, {"overrides": {"*.fc1": {"format": "nvfp4"}}}], ids=["one recipe", "two"])
def test_one_process_of_its_own(tmp_path, settings):
    """vLLM runs Phi by transformers' own class, and changes it in its process. fc1 reads what q, k and v read."""
    directory = checkpoint(tmp_path / "checkpoint", kind="phi", **settings)
    status, output, rows = greedy_apart(directory, tmp_path)
    assert status == 0, output[-3000:]
    found = agreement(directory, rows)
    assert found.tokens == 144 and found.close, found


TWO = dict(tensor_parallel_size=2)
SPREAD = dict(enable_expert_parallel=True)
# In eager mode the CPU runner of vLLM 0.32.0 lacks the buffers of a second stage, for every model.
STAGES = dict(tensor_parallel_size=1, pipeline_parallel_size=2, enforce_eager=False)
# Ranks add up in another order than one process. With seed 0 that flips a code of NVFP4.
CASES = {
    "mxfp4": {},
    "nvfp4, two recipes in a linear": dict(format="nvfp4", overrides={"*.k_proj": {"format": "mxfp4"}}, seed=1),
    "a transform a linear": dict(share_transform=False),
    "hadamard, a tied head in 8 bits": dict(kind="tied", transform="hadamard", head="int8"),
    "a quantized head": dict(ignore=("!lm_head",)),
    "phi": dict(kind="phi"),
    "phi3, fused on disk": dict(kind="phi3"),
    "experts, cut": dict(kind="qwen3_moe", ignore=("*.mlp.gate",)),
    "experts, spread": dict(kind="qwen3_moe", ignore=("*.mlp.gate",), **SPREAD),
    "experts in two formats, spread": dict(
        kind="qwen3_moe", ignore=("*.mlp.gate",), overrides={"*.down_proj": {"format": "nvfp4"}}, **SPREAD
    ),
    "stages": dict(kind="llama", **STAGES),
    "stages of experts": dict(kind="qwen3_moe", ignore=("*.mlp.gate",), **STAGES),
}
OF_VLLM = ("enable_expert_parallel", "enforce_eager", "pipeline_parallel_size", "tensor_parallel_size")


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_two_processes(tmp_path, cache_root, settings):
    of_vllm = {name: value for name, value in settings.items() if name in OF_VLLM}
    directory = checkpoint(tmp_path / "checkpoint", **{n: v for n, v in settings.items() if n not in of_vllm})
    status, output, rows = greedy_apart(directory, tmp_path, **TWO | of_vllm)
    assert status == 0, output[-3000:]
    found = agreement(directory, rows)
    assert found.tokens == 144 and found.close, found


def test_two_processes_compiled(tmp_path, cache_root):
    directory = checkpoint(tmp_path / "checkpoint")
    status, output, rows = greedy_apart(directory, tmp_path, **TWO, enforce_eager=False)
    assert status == 0, output[-3000:]
    found = agreement(directory, rows)
    assert found.tokens == 144 and found.close, found
