"""`explain`: one screen by default, true reasons and sizes, graphs of any model, and the graph that is compiled."""

import math

import pytest
import torch
from expecttest import assert_expected_inline
from models import plain, tokens
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import wush_compile as wc
from wush_compile.checkpoint.record import quantization_of
from wush_compile.errors import CaptureError, ConfigError
from wush_compile.reporting.graphs import compiled_graph, example_inputs
from wush_compile.reporting.summary import model_bytes
from wush_compile.reporting.table import group_table

VOCABULARY = 97


def rounded(model: nn.Module, data: list, **settings) -> nn.Module:
    return wc.quantize(model.eval(), data, progress=False, **{"solver": "rtn", "transform": "hadamard", **settings})


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        hidden_dropout_prob=0.1,
    )
    return ViTModel(config).eval()


IMAGES = [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}]


class Several(nn.Module):
    """Two inputs of different dtypes, and linears of several widths."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 64)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x, kinds):
        return self.second(self.first(x) + self.embed(kinds))


def several() -> nn.Module:
    torch.manual_seed(0)
    return rounded(Several(), [(torch.randn(6, 32), torch.arange(6))])


# -- one screen ------------------------------------------------------------------------------------------------------


def with_known_reports(model: nn.Module) -> nn.Module:
    """The model with seconds and losses that do not depend on the machine."""
    for i, report in enumerate(quantization_of(model).report.values()):
        report |= {"seconds": 0.25, "loss": 2.0**-i, "relative_loss": 0.01 * (i + 1)}
    return model


def test_one_screen():
    settings = {"ignore": ("*.o_proj",), "overrides": {"*.down_proj": {"format": "nvfp4"}}}
    model = with_known_reports(rounded(plain("llama", layers=6), [tokens(2, 16)], **settings))
    quantization_of(model).report["model.layers.0.mlp.down_proj"]["damping_tries"] = 3
    assert_expected_inline(
        wc.explain(model).replace("─", "-"),
        """\
settings: format=mxfp4, transform=hadamard, solver=rtn, ignore=(lm_head *.o_proj), overrides=(*.down_proj:format=nvfp4)
quantized: 36 linears in 18 groups, 0.1 MiB, 5.63 bits a weight (4 codes, 0.314 scales, 0.188 factors of rows, 1.12
    transforms)
model: 0.4 MiB before, 0.2 MiB now
calibration: 32 tokens in 2 windows, groups solved in 4.5 s
not quantized:
  6: ignored by the configuration ('*.o_proj'): model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj,
    model.layers.2.self_attn.o_proj and 3 more
  1: ignored by the configuration ('lm_head'): lm_head
  1: Embedding is not a linear layer: model.embed_tokens

10 of 18 groups, largest relative loss first
 group                                          rows x width  tokens      loss  relative  seconds   KiB  notes
 --------------------------------------------------------------------------------------------------------------------
 model.layers.5.mlp.down_proj                       64 x 128      32  7.63e-06  1.80e-01     0.25   5.0  format=nvfp4
 model.layers.5.mlp.gate_proj+up_proj               256 x 64      32  1.53e-05  1.70e-01     0.25  11.0
 model.layers.5.self_attn.q_proj+k_proj+v_proj      128 x 64      32  3.05e-05  1.60e-01     0.25   6.5
 model.layers.4.mlp.down_proj                       64 x 128      32  6.10e-05  1.50e-01     0.25   5.0  format=nvfp4
 model.layers.4.mlp.gate_proj+up_proj               256 x 64      32  1.22e-04  1.40e-01     0.25  11.0
 model.layers.4.self_attn.q_proj+k_proj+v_proj      128 x 64      32  2.44e-04  1.30e-01     0.25   6.5
 model.layers.3.mlp.down_proj                       64 x 128      32  4.88e-04  1.20e-01     0.25   5.0  format=nvfp4
 model.layers.3.mlp.gate_proj+up_proj               256 x 64      32  9.77e-04  1.10e-01     0.25  11.0
 model.layers.3.self_attn.q_proj+k_proj+v_proj      128 x 64      32  1.95e-03  1.00e-01     0.25   6.5
 model.layers.2.mlp.down_proj                       64 x 128      32  3.91e-03  9.00e-02     0.25   5.0  format=nvfp4

all=True (--all) shows every group, every name and the graph of a layer; view="compiled" (--graph layer.0) shows
the graph inside torch.compile.""",
    )


def test_all_shows_every_group_name_and_setting():
    model = rounded(plain("llama", layers=6), [tokens(2, 16)], ignore=("*.o_proj",))
    short, text = wc.explain(model), wc.explain(model, all=True)
    for i in range(6):
        assert f"model.layers.{i}.self_attn.o_proj" in text and f"model.layers.{i}.mlp.down_proj" in text
    assert "model.layers.5.self_attn.o_proj" not in short and "and 3 more" in short
    assert "damping=0.01" in text and "damping" not in short
    assert "before: model.layers.0" in text and "before:" not in short


def test_the_table_begins_with_the_worst():
    model = with_known_reports(rounded(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), [torch.randn(32, 64)]))
    report = quantization_of(model).report
    report["1"] |= {"relative_loss": math.nan, "damping_tries": 3}
    del report["0"]["relative_loss"]

    def names(**settings) -> list[str]:
        lines = [line.split() for line in group_table(model, **settings).splitlines()]
        return [line[0] for line in lines if line and line[0].isdigit()]

    assert names() == ["1", "3", "2", "0"] and names(limit=2) == ["1", "3"]
    assert "damped 3 times" in group_table(model)


def test_a_checkpoint_shows_what_its_run_learned(tmp_path):
    model = rounded(plain("llama"), [tokens(2, 16)], format="nvfp4")
    wc.save(model, tmp_path / "model")
    again = wc.load(tmp_path / "model")
    assert wc.explain(again, all=True) == wc.explain(model, all=True)
    (tmp_path / "model" / "wush_report.json").unlink()
    text = wc.explain(wc.load(tmp_path / "model"))
    assert "8 groups, in the model's order; their losses are not known" in text and "calibration:" not in text


def test_bits_and_bytes_are_what_is_stored():
    model = several()
    before, after = model_bytes(model)
    weights = 2 * 32 * 64
    assert before == sum(p.numel() for p in Several().parameters()) * 4
    # A scale a group of 32 and a factor a row.
    packed, scales, transform, bias = weights // 2, weights // 32 + 2 * (32 + 64), 2 * 32 * 32 * 4, 64 * 4
    assert after == 10 * 64 * 4 + packed + scales + transform + bias
    bits = 8 * (packed + scales + transform + bias) / weights
    parts = "4 codes, 0.25 scales, 0.375 factors of rows, 16 transforms, 0.5 biases"
    assert f"{bits:.2f} bits a weight ({parts})" in " ".join(wc.explain(model).split())


def test_what_cannot_be_explained():
    model = several()
    with pytest.raises(wc.WushError, match="not quantized"):
        wc.explain(Several())
    with pytest.raises(ConfigError, match="did you mean 'compiled'"):
        wc.explain(model, view="compile")
    with pytest.raises(ConfigError, match="unknown pass 'fuse_norms'"):
        compiled_graph(model, after="fuse_norms")
    with pytest.raises(ConfigError, match="has no layer 7"):
        compiled_graph(model, layer=7)

    def untraceable(x, kinds):
        if torch.compiler.is_compiling():
            raise ValueError("no tracing")
        return model.second(model.first(x))

    model.forward = untraceable
    with pytest.raises(CaptureError, match="cannot trace Several as one graph"):
        compiled_graph(model)
    assert "(no graph: torch.export cannot trace Several" in wc.explain(model, all=True)


def test_the_text_is_stable_and_graphs_come_on_request():
    model = wc.quantize(plain("llama"), [tokens(2, 16)], progress=False)
    assert wc.explain(model) == wc.explain(model)
    text = wc.explain(model, view="captured")
    assert text == wc.explain(model, view="captured") and "before: model.layers.0" in text
    after = text[text.index("after: model.layers.0") :]
    assert "aten.linear" in text and "aten.linear" not in after and after.count("wush.fp4_linear(") == 7


# -- reasons ---------------------------------------------------------------------------------------------------------


def test_reasons_for_the_weights_of_mamba():
    torch.manual_seed(0)
    model = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=4)
    )
    rounded(model, [tokens(1, 16)])
    assert_expected_inline(
        "\n".join(f"{k}: {v}" for k, v in sorted(quantization_of(model).ignored.items())),
        """\
backbone.layers.0.mixer.A_log: no matrix product reads it
backbone.layers.0.mixer.conv1d: Conv1d is not a linear layer
backbone.layers.0.mixer.dt_proj: its weight is read by MambaMixer directly, not through its own forward
lm_head: ignored by the configuration ('lm_head')""",
    )


class Kinds(nn.Module):
    """Matrices of many kinds that no linear layer multiplies by."""

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    def __init__(self):
        super().__init__()
        self.good, self.own, self.transposed = nn.Linear(64, 64), self.Own(64, 64), nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(4, 64, 64))
        self.matrix, self.gains = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(1, 1, 64))
        self.conv = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, x):
        x = self.own(self.good(x)) @ self.transposed.weight
        x = self.attention(x, x, x, need_weights=False)[0] * self.gains
        x = torch.bmm(x, self.experts[: x.shape[0]].transpose(1, 2).to(x.dtype)) @ self.matrix
        return self.conv(x.transpose(1, 2))


def test_reasons_for_matrices_of_many_kinds():
    torch.manual_seed(0)
    model = rounded(Kinds(), [(torch.randn(2, 5, 64),)])
    assert_expected_inline(
        "\n".join(f"{k}: {v}" for k, v in sorted(quantization_of(model).ignored.items())),
        """\
attention.in_proj_weight: belongs to MultiheadAttention, not to a linear layer
attention.out_proj: its weight is read by MultiheadAttention directly, not through its own forward
conv: Conv1d is not a linear layer
experts: 3-D weight of Kinds, which does not multiply rows in the order of experts
gains: no matrix product reads it
matrix: belongs to Kinds, not to a linear layer
own: Own has a forward of its own
transposed: its weight is read by Kinds directly, not through its own forward""",
    )


# -- graphs of models with other inputs ------------------------------------------------------------------------------


def test_example_inputs_are_saved_with_the_report(tmp_path):
    wc.save(several(), tmp_path / "model")
    again = wc.load(tmp_path / "model", model=Several())
    example = {"names": None, "dtypes": ["float32", "int64"], "shapes": [[6, 32], [6]]}
    assert quantization_of(again).example == example
    text = wc.explain(again, all=True)
    assert "aten.embedding" in text and "(no graph" not in text and text.count("wush.fp4_linear(") == 2
    quantization_of(again).example = {"names": ["x"], "dtypes": ["float99"], "shapes": [[1]]}
    assert "(no graph: the example inputs" in wc.explain(again, all=True)


def test_a_vision_transformer(tmp_path):
    wc.save(rounded(vit(), IMAGES), tmp_path / "model")
    model = wc.load(tmp_path / "model")
    for known in (True, False):
        text = wc.explain(model, "captured")
        assert "after: layers.0" in text and text.count("wush.fp4_linear(") == 6
        assert tuple(example_inputs(model, "meta")["pixel_values"].shape) == (2, 3, 16, 16), known
        quantization_of(model).example = None


def test_speech_recognition():
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    data = [{"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(2, 6)}]
    text = wc.explain(rounded(model, data), "captured")
    assert "after: model.encoder.layers.0" in text and "wush.fp4_linear(" in text
    quantization_of(model).example = None
    assert "(no graph: the checkpoint does not say what inputs" in wc.explain(model, "captured")


def test_no_two_values_have_one_name():
    text = wc.explain(rounded(vit(), IMAGES), "captured")
    for graph in text.split("\n\n")[-2:]:
        head, *lines = graph.splitlines()
        names = head[head.index("(") + 1 : -1].split(", ") + [line.split(" = ")[0] for line in lines if " = " in line]
        assert len(names) == len(set(names)) > 20


# -- the graph that is compiled --------------------------------------------------------------------------------------


def test_the_compiled_view_is_the_graph_that_is_compiled():
    """GPT-2 has dropout, of which eval mode leaves nothing."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = rounded(GPT2LMHeadModel(config), [tokens(2, 8)])
    text = compiled_graph(model)
    with torch.no_grad(), wc.trace_graphs() as log:
        torch.compile(model, backend="wush")(input_ids=tokens(2, 8), use_cache=False)
    (graph,) = log.graphs
    assert graph["cleanup"].counts["layer_norm_transform_quantize"] == 2
    assert graph.text(layer=0).split("\n\nkernels\n")[0] == text
    assert compiled_graph(model.train()) == text and all(m.training for m in model.modules())
