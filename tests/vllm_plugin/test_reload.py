"""Weights that are loaded again in place (vLLM's `reload_weights`) are those that it then computes with."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
from safetensors.torch import load_file, save_file
from served import agreement, checkpoint, engine, prompts, rows_of, sampling

from wush_compile.errors import CheckpointError

CASES = {
    "mxfp4": {},
    "two recipes in a linear": dict(
        overrides={"*.k_proj": {"format": "nvfp4"}, "*.up_proj": {"activation_format": "fp8"}}
    ),
    "a quantized head": dict(ignore=("!lm_head",)),
    "a tied head in 8 bits": dict(kind="tied", head="int8"),
    "a transform a linear": dict(format="nvfp4", share_transform=False),
    "experts": dict(kind="qwen3_moe", ignore=("*.mlp.gate",)),
}


def addresses(llm) -> list[tuple[str, int]]:
    """The memory of every parameter and buffer, which captured CUDA graphs would read."""
    [found] = llm.apply_model(
        lambda model: [(name, t.data_ptr()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    )
    return found


def answers(llm) -> list:
    llm.reset_prefix_cache()
    return rows_of(llm.generate([{"prompt_token_ids": p} for p in prompts()], sampling(), use_tqdm=False))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_another_checkpoint_and_back(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for `apply_model`
    directories = [checkpoint(tmp_path / str(seed), **settings, seed=seed) for seed in (1, 2)]
    rows = []
    with engine(directories[0]) as llm:
        places = addresses(llm)
        for directory in (directories[0], directories[1], directories[0]):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})
            rows.append(answers(llm))
            assert addresses(llm) == places
    assert rows[2] == rows[0] != rows[1]
    for directory, found in zip(directories, rows):
        found = agreement(directory, found)
        assert found.same >= found.tokens - 1 and found.mean < 1e-3, found  # of two seeds, a code may flip


def test_what_does_not_fit_is_refused(tmp_path):
    first = checkpoint(tmp_path / "first")
    for name in ("lacks", "other"):
        tensors = load_file(first / "model.safetensors")
        if name == "lacks":
            del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
        else:
            transform = tensors["model.layers.1.mlp.down_proj.input_transform"]
            tensors["model.layers.1.mlp.down_proj.input_transform"] = transform.to(torch.float16)
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    for name, message in (("lacks", r"lacks weight_scale of model\.layers\.1\."), ("other", r"start vLLM anew")):
        with engine(first) as llm:
            with pytest.raises(CheckpointError, match=message):
                llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / name)})
