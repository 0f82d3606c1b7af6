"""Models of other families than Llama's: two sides, two towers, images beside text, wrapped or offloaded models."""

import accelerate
import pytest
import torch
from helpers import quantize
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import wush_compile as wc
from wush_compile.capture.export import capture
from wush_compile.checkpoint.record import quantization_of
from wush_compile.modules import WushLinear
from wush_compile.passes.calibration.group import find_groups

TEXT = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOWER = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(length))


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, WushLinear)}


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**{**TOWER, "num_hidden_layers": 2}, image_size=32, patch_size=16)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=255, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def with_image() -> dict[str, torch.Tensor]:
    tokens = ids(1, 16)
    tokens[:, 2:6] = 255
    return {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


# -- caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_ends_no_trace():
    """These forwards name no `use_cache`."""
    config = GraniteMoeConfig(**TEXT, num_local_experts=2, num_experts_per_tok=1)
    model = GraniteMoeForCausalLM(config).eval()
    quantize(model, ids(1, 16))
    assert len(quantized(model)) == 4
    assert model.config.use_cache  # the setting of the user's model is as it was


class Remembers(nn.Module):
    """Returns an object of its own class."""

    class State:
        def __init__(self, last):
            self.last = last

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.f(x), self.State(self.g(x))


def test_tensors_in_unknown_results_are_kept():
    assert quantized(quantize(Remembers().eval(), torch.randn(4, 64))) == {"f", "g"}


# -- images beside text ----------------------------------------------------------------------------------------------


def test_a_vision_language_model_on_text():
    model = quantize(llava(), ids(1, 16))
    assert {name.split(".")[1] for name in quantized(model)} == {"language_model"}
    reasons = quantization_of(model).ignored
    assert reasons["model.multi_modal_projector.linear_1"] == "not reached by the traced forward"


@torch.no_grad()
def test_a_vision_language_model_on_images():
    model, batch = llava(), with_image()
    expected = model(**batch).logits
    captured = capture(model, [batch])
    assert torch.equal(captured.graph_module(**batch)["logits"], expected)
    groups, skipped = find_groups(captured.graph_module, model, wc.WushConfig())
    assert all(linear.name.startswith("model.language_model.") for g in groups for linear in g.linears)
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    pattern = "!model.vision_tower.encoder.layers.*"
    assert skipped[name] == (
        f"encodes pixel_values, which stays in 16 bits by default: ignore=({pattern!r},) quantizes it"
    )
    groups, skipped = find_groups(captured.graph_module, model, wc.WushConfig(ignore=(pattern,)))
    assert name in {linear.name for g in groups for linear in g.linears}
    assert "model.multi_modal_projector.linear_1" in skipped
    quantize(model, batch, ignore=(pattern,))
    assert name in quantized(model) and model(**batch).logits.isfinite().all()


class Looks(nn.Module):
    """Its image side is not traced."""

    def __init__(self):
        super().__init__()
        self.e, self.f, self.v = nn.Embedding(256, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, input_ids, pixel_values=None):
        h = self.e(input_ids)
        if pixel_values is not None:
            if torch.compiler.is_compiling():
                raise ValueError("no tracing")
            h = h + self.v(pixel_values)
        return self.f(h)


def test_a_vision_side_that_cannot_be_traced_has_a_remedy():
    model, tokens = Looks().eval(), ids(2, 16)
    with pytest.raises(wc.WushError, match="Calibrate on text alone, without pixel_values"):
        quantize(model, {"input_ids": tokens, "pixel_values": torch.randn(2, 1, 64)})
    assert quantized(quantize(model, tokens)) == {"f"}


def test_two_towers_are_both_quantized():
    """CLIP has no linear that depends on both. Its `get_input_embeddings` raises."""
    config = CLIPConfig(
        text_config=dict(vocab_size=256, eos_token_id=2, bos_token_id=1, **TOWER),
        vision_config=dict(image_size=32, patch_size=8, **TOWER),
        projection_dim=64,
    )
    model = CLIPModel(config).eval()
    quantize(model, {"input_ids": ids(2, 8), "pixel_values": torch.randn(2, 3, 32, 32)})
    assert {name.split(".")[0] for name in quantized(model)} == {
        "text_model",
        "vision_model",
        "text_projection",
        "visual_projection",
    }


# -- encoder-decoders ------------------------------------------------------------------------------------------------


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


SIDE = dict(
    vocab_size=256,
    d_model=64,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
)


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(**SIDE, max_position_embeddings=64)).eval()


def whisper() -> nn.Module:
    config = WhisperConfig(
        **SIDE,
        num_mel_bins=8,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config).eval()


def side_tokens(model: nn.Module) -> dict[str, set[int]]:
    """Tokens that each side's groups have seen, without the groups of cross-attention's keys and values."""
    found: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    for name, report in quantization_of(model).report.items():
        if "encoder_attn" not in name and "EncDecAttention" not in name:
            found["decoder" if "decoder" in name else "encoder"].add(report["tokens"])
    return found


@pytest.mark.parametrize("make", [t5, bart])
def test_text_to_text(make):
    """Without anything for the decoder it gets the encoder's text; `labels` become its inputs."""
    model = quantize(make(), ids(2, 16))
    assert side_tokens(model) == {"encoder": {32}, "decoder": {32}}
    model = quantize(make(), {"input_ids": ids(2, 16), "labels": ids(2, 9)})
    assert side_tokens(model) == {"encoder": {32}, "decoder": {18}}
    model = quantize(make(), {"input_ids": ids(2, 16), "decoder_input_ids": ids(2, 7)})
    assert side_tokens(model) == {"encoder": {32}, "decoder": {14}}


def test_the_masks_of_both_sides():
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[0, 4:7] = 0
    batch = {"input_ids": ids(2, 16), "attention_mask": mask, "decoder_input_ids": ids(2, 16)}
    model = quantize(t5(), batch)
    assert side_tokens(model) == {"encoder": {29}, "decoder": {32}}


def test_speech_to_text():
    batch = {"input_features": torch.randn(1, 8, 64), "decoder_input_ids": ids(1, 9)}
    model = quantize(whisper(), batch)
    assert side_tokens(model) == {"encoder": {32}, "decoder": {9}}


def test_the_decoder_is_warned_of_too(caplog):
    quantize(t5(), {"input_ids": ids(16, 16), "decoder_input_ids": ids(16, 4)}, solver="gptq")
    short = [r.getMessage() for r in caplog.records if "rank-deficient" in r.getMessage()]
    assert len(short) == 1 and short[0].startswith("64 calibration tokens") and "decoder" in short[0]


# -- wrapped and offloaded models ------------------------------------------------------------------------------------


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def test_a_compiled_or_parallel_model_is_quantized_inside():
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel, lambda m: m):
        inner = llama()
        wrapped = wrap(inner)
        assert quantize(wrapped, ids(2, 16)) is wrapped
        assert len(quantized(inner)) == 7
        assert wrapped(ids(1, 8)).logits.isfinite().all()


def test_parts_that_are_compiled_are_traced_all_the_same():
    model = llama()
    model.model.layers[0].mlp.compile(backend="eager")
    model(ids(1, 16))
    assert len(quantized(quantize(model, ids(2, 16)))) == 7


@torch.no_grad()
def test_an_offloaded_model_is_read_through_its_hooks(tmp_path):
    expected = quantize(llama(), ids(2, 16))
    for offload in (
        lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
        lambda m: accelerate.disk_offload(m, tmp_path, execution_device="cpu"),
    ):
        model = llama()
        offload(model)
        quantize(model, ids(2, 16))
        assert len(quantized(model)) == 7
        assert torch.equal(model(ids(1, 8)).logits, expected(ids(1, 8)).logits)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = llama()
    with pytest.raises(wc.WushError, match="model.embed_tokens.weight has no values"):
        quantize(model, ids(1, 16))
