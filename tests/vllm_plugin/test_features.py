"""vLLM's own features on a quantized model: each works, and gives what it should."""

import json

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: `make test-vllm`")
from helpers import quantize
from safetensors.torch import save_file
from served import (
    COMMON,
    NEW,
    VOCABULARY,
    agreement,
    checkpoint,
    engine,
    greedy,
    greedy_apart,
    prompts,
    random_model,
    rows_of,
    sampling,
    tokenizer,
)
from torch import nn

import wush_compile as wc


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("features") / "checkpoint", kind="llama")


def test_a_prefix_is_cached(directory):
    prompt = torch.randint(3, 1000, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    with engine(directory, enable_prefix_caching=True, block_size=32) as llm:
        results = [
            llm.generate([{"prompt_token_ids": prompt + [end]}], sampling(), use_tqdm=False) for end in (7, 8, 7)
        ]
    assert [r[0].num_cached_tokens for r in results] == [0, 32, 32]
    found = agreement(directory, rows_of([r[0] for r in results]))
    assert found.tokens == 3 * NEW and found.close, found


def test_an_adapter(directory, tmp_path):
    """vLLM's LoRA over a quantized linear: the adapter gets the activations before they are quantized."""
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(4)  # with 3 a code flips, in one of the prompts
    tensors, targets = {}, {"self_attn.q_proj": 256, "mlp.down_proj": 512}
    for layer in (0, 1):
        for name, width in targets.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.05 * torch.randn(8, width, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.05 * torch.randn(256, 8, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

    with engine(directory, enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(tmp_path))
        asked = [{"prompt_token_ids": p} for p in prompts()]
        plain = rows_of(llm.generate(asked, sampling(), use_tqdm=False))
        adapted = rows_of(llm.generate(asked, sampling(), use_tqdm=False, lora_request=request))
    model = nn.Module.float(wc.load(directory))
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            linear = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            linear.register_forward_hook(lambda _, args, y, a=a, b=b: y + 2.0 * (args[0] @ a.T @ b.T))
    for rows, by in ((plain, None), (adapted, model)):
        found = agreement(directory, rows, by)
        assert found.close, found
    assert [row[1] for row in plain] != [row[1] for row in adapted]


def test_a_cache_in_fp8(directory):
    rows = greedy(directory, kv_cache_dtype="fp8")
    found = agreement(directory, rows)
    assert found.tokens == 6 * NEW and 5e-5 < found.mean < 0.2, found  # the cache rounds, and codes flip


def test_speculative_decoding(directory, tmp_path):
    """By n-grams; accepted or not, the tokens are those of one step after the other. It imports numba, behind which
    vLLM 0.32.0 starts no second engine for the CPU in the same process."""
    settings = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1)
    status, output, rows = greedy_apart(directory, tmp_path, speculative_config=settings)
    assert status == 0, output[-3000:]
    found = agreement(directory, rows)
    assert found.tokens == 6 * NEW and found.close, found


@pytest.mark.parametrize("draft", ["quantized", "bf16"])
def test_a_draft_model(directory, tmp_path, draft):
    """The draft is of the same model in another format, or not quantized: some of its tokens are accepted."""
    proposer = tmp_path / "draft"
    if draft == "quantized":
        checkpoint(proposer, kind="llama", format="nvfp4")
    else:
        random_model("llama").save_pretrained(proposer)
    settings = dict(method="draft_model", model=str(proposer), num_speculative_tokens=3)
    with engine(directory, speculative_config=settings, disable_log_stats=False) as llm:
        asked = [{"prompt_token_ids": p} for p in prompts()]
        rows = rows_of(llm.generate(asked, sampling(), use_tqdm=False))
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    found = agreement(directory, rows)
    assert found.close, found
    drafted, accepted = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert 0 < accepted <= drafted, counts


def test_a_vision_language_model(tmp_path):
    """The text side of PaliGemma, whose tensors vLLM renames. Log-probabilities are held to a looser bound: vLLM and
    transformers differ as much (0.064 on average) on this model before it is quantized."""
    from transformers import (
        AutoTokenizer,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = GemmaConfig(**COMMON | dict(tie_word_embeddings=True, head_dim=64))
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=999, projection_dim=256, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    directory = tmp_path / "checkpoint"
    wc.save(quantize(model, torch.randint(3, 900, (4, 64))), directory)
    tokenizer(directory)
    words = AutoTokenizer.from_pretrained(directory)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 4
    PaliGemmaProcessor(image_processor=images, tokenizer=words).save_pretrained(directory)
    found = agreement(directory, greedy(directory, skip_tokenizer_init=False, language_model_only=True))
    assert found.same == found.tokens and found.mean < 0.1, found
