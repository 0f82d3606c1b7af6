"""Weights of 8 bits: int8 with a bf16 scale a group of 32, beside activations of 16 bits or fp8."""

import copy

import oracle
import pytest
import torch
from helpers import assert_like_eager, emulates_rounding, files, quantize, same_tensors
from hypothesis import given
from hypothesis import strategies as st
from models import pair, pair_rows, plain, tokens
from torch.export import Dim

import wush_compile as wc
from wush_compile import formats
from wush_compile.config import WushConfig
from wush_compile.errors import ConfigError, NonFiniteError
from wush_compile.graphs.printing import count_ops
from wush_compile.kernels.dispatch import arithmetic
from wush_compile.reporting.contents import read_contents

wush = torch.ops.wush
HEAD = {"lm_head": {"format": "int8", "activation_format": None}}
E8M0 = torch.zeros(1, 128, dtype=torch.uint8), torch.full((1, 8), 127, dtype=torch.uint8)  # one row of MXFP4 zeros
INT8 = {"format": "int8", "activation_format": None}


def weights(rows: int = 24, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    return formats.quantize(w, "int8", "absmax")


# -- the format ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(-130, 120), st.sampled_from([1, 3, 17]))
def test_codes_and_scales_are_those_of_the_oracle(seed, octave, rows):
    x = torch.randn(rows, 2, 32, generator=torch.Generator().manual_seed(seed)) * 2.0**octave
    x[0, 0, :3] = torch.tensor([0.0, -0.0, x[0, 0].abs().max().item() / 254])
    if rows > 1:
        x[1], x[-1, 1, 5] = 0, (float("nan"), float("inf"))[seed % 2]
    codes, scales = formats.quantize(x.flatten(1), "int8", "absmax")
    wanted_codes, wanted_scales = oracle.quantize(x.numpy(), "int8", "absmax")
    assert torch.equal(codes.unflatten(1, (2, 32)), torch.from_numpy(wanted_codes))
    assert torch.equal(scales.float().nan_to_num(-1), torch.from_numpy(wanted_scales).nan_to_num(-1))
    decoded = torch.from_numpy(oracle.dequantize(wanted_codes, wanted_scales, "int8"))
    assert torch.equal(formats.dequantize(codes, scales, "int8").nan_to_num(-1), decoded.flatten(1).nan_to_num(-1))


def test_no_value_is_clipped_by_more_than_half_a_step():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0)).double()
    codes, scales = formats.quantize(x.float(), "int8", "absmax")
    error = (formats.dequantize(codes, scales, "int8") - x).abs()
    assert (error <= scales.double() * 0.5 * (1 + 1e-5)).all()
    assert codes.view(torch.int8).min() >= -127


# -- ops -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 3, 129])
@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_the_product_is_that_of_the_decoded_operands(activation, rows):
    x = torch.randn(rows, 2, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    codes, scales = wush.transform_quantize(x, None, None, activation, {"fp8": "token", "none": "none"}[activation])
    bias = torch.randn(24, generator=torch.Generator().manual_seed(3))
    args = None, *weights(), None, bias, None, "int8", torch.float32, "rows", activation
    got = wush.fp4_linear(codes, scales, *args)
    decoded = formats.dequantize_fp8(codes, scales) if activation == "fp8" else codes.float()
    want = decoded.double() @ formats.dequantize(*weights(), "int8").double().T + bias
    assert got.shape == (rows, 2, 24) and torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_decoded_in_parts_gives_the_same():
    w, scales = weights(5000, 64)
    x = torch.randn(3, 64)
    y = wush.fp4_linear(x, x[:, :0], None, w, scales, None, None, None, "int8", torch.float32, "rows", "none")
    torch.testing.assert_close(y, x @ formats.dequantize(w, scales, "int8").T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["fp8", "none"])
def test_the_op_keeps_its_contract(activation):
    codes, scales = wush.transform_quantize(
        torch.randn(3, 64).bfloat16(), None, None, activation, {"fp8": "token", "none": "none"}[activation]
    )
    args = codes, scales, None, *weights(), None, None, None, "int8", torch.bfloat16, "rows", activation
    torch.library.opcheck(wush.fp4_linear.default, args)


def test_four_bit_activations_and_wrong_widths_are_refused():
    codes, scales = formats.quantize(torch.randn(3, 64), "mxfp4", "absmax")
    fake = torch._subclasses.FakeTensorMode()
    with fake, pytest.raises(ValueError, match="int8 is a format of weights alone"):
        args = [fake.from_tensor(t) for t in (codes, scales, *weights())]
        wush.fp4_linear(*args[:2], None, *args[2:], None, None, None, "int8", torch.bfloat16)
    with fake, pytest.raises(RuntimeError, match="activation has 128 channels, weight 64"):
        x = torch.randn(3, 128)
        args = [fake.from_tensor(t) for t in weights()]
        wush.fp4_linear(x, x[:, :0], None, *args, None, None, None, "int8", torch.float32, "rows", "none")
    with pytest.raises(ConfigError, match="unknown format of activations 'int8'"):  # no quantizer of activations has it
        wush.transform_quantize(torch.randn(3, 64), None, None, "int8", "absmax")


def test_a_row_that_is_not_finite_stays_alone():
    x = torch.randn(4, 64).bfloat16()
    x[1, 5], x[3, 0] = float("nan"), float("inf")
    for activation in ("fp8", "none"):
        codes, scales = wush.transform_quantize(x, None, None, activation, {"fp8": "token"}.get(activation, "none"))
        args = None, *weights(), None, None, None, "int8", torch.bfloat16, "rows", activation
        y = wush.fp4_linear(codes, scales, *args)
        assert not y[[1, 3]].isfinite().all(-1).any() and y[[0, 2]].isfinite().all(), activation


# -- settings --------------------------------------------------------------------------------------------------------


def test_what_is_not_int8s_is_an_error_or_has_no_effect():
    with pytest.raises(ConfigError, match="int8 is a format of weights alone: give activation_format None"):
        WushConfig(format="int8")
    with pytest.raises(ConfigError, match=r"overrides\['lm_head'\]: int8 is a format of weights alone"):
        WushConfig(overrides={"lm_head": {"format": "int8"}})
    with pytest.raises(ConfigError, match="unknown head 'mxfp4'.*None, int8"):
        WushConfig(head="mxfp4")
    recipe = WushConfig.paper(**INT8).recipe_of("x")
    assert (recipe.transform, recipe.solver, recipe.weight_scale_rule) == ("identity", "rtn", "absmax")
    assert not recipe.needs_data and not WushConfig(**INT8).needs_data
    back = WushConfig(**INT8, overrides={"x": {"format": "mxfp4"}}).recipe_of("x")
    assert back == WushConfig(activation_format=None).recipe


def test_the_head_is_quantized_where_it_is_named():
    assert WushConfig().ignores("lm_head") == "lm_head"
    assert WushConfig(overrides={"*": {"damping": 0.02}}).ignores("lm_head") == "lm_head"
    for config in (WushConfig(head="int8"), WushConfig(overrides=HEAD), WushConfig(format="nvfp4", head="int8")):
        assert config.ignores("lm_head") is None and config.recipe_of("lm_head").format == "int8"
        assert config.recipe_of("model.layers.0.mlp.up_proj").format != "int8"
    assert WushConfig(head="int8", ignore=("*head",)).ignores("lm_head") == "*head"
    with pytest.raises(ConfigError, match="head='int8' is for a module named lm_head, which Sequential does not have"):
        quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.randn(3, 64), head="int8")


def test_what_a_gpu_lacks_is_said():
    words = {c: arithmetic("mxfp4", c, "fp8") for c in ((8, 0), (8, 9), (9, 0), (12, 0))}
    assert "FP8 tensor cores" in words[9, 0]
    assert all("no faster than activations of 16 bits" in words[c] for c in words if c != (9, 0))
    assert "no faster" in arithmetic("nvfp4", (9, 0), "fp8") and "no faster" not in arithmetic("int8", (9, 0), "none")


def test_a_product_that_a_gpu_lacks_is_said_once(caplog, monkeypatch):
    """On Ampere and Ada both operands are decoded to bf16; Hopper has the product, and says nothing."""
    triton_linear = pytest.importorskip("wush_compile.kernels.triton.linear.fp4_linear")
    taken = []
    monkeypatch.setattr(triton_linear, "_product", lambda o, dtype, kernel: taken.append(o.decoded) or torch.zeros(1))
    triton_linear._say_slow.cache_clear()
    codes, weight, scales = torch.zeros(1, 256).to(torch.float8_e4m3fn).view(torch.uint8), *E8M0
    with caplog.at_level("WARNING", "wush_compile"):
        for of_device in ((9, 0), (8, 0), (8, 0)):
            monkeypatch.setattr(triton_linear, "capability", lambda device, found=of_device: found)
            triton_linear.fp4_linear(
                codes,
                torch.ones(1, 1),
                None,
                weight,
                scales,
                None,
                None,
                None,
                "mxfp4",
                torch.bfloat16,
                activation_format="fp8",
            )
    assert taken == ["mxfp4", "mxfp4_bf16", "mxfp4_bf16"]
    assert [r.getMessage() for r in caplog.records] == [
        "mxfp4 weights with fp8 activations have no fp8 product at compute capability 8.0: both are decoded to bf16, "
        "which is no faster than activations of 16 bits"
    ]


def test_activations_that_overflow_fp16_are_an_error_that_names_the_layer():
    """A Hadamard transform adds 32 channels up; WUSH's transform whitens, and fp8 has a scale of its own."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).half(), torch.full((64, 64), 30000.0).half()
    torch.nn.init.normal_(model[0].weight, std=1e-4)
    with pytest.raises(NonFiniteError, match="0: its transformed activations overflow float16: .*'fp8'"):
        quantize(copy.deepcopy(model), x, transform="hadamard", activation_format=None)
    for settings in (dict(transform="hadamard", activation_format="fp8"), dict(activation_format=None)):
        assert quantize(copy.deepcopy(model), x, **settings)(x).isfinite().all()


# -- whole models ----------------------------------------------------------------------------------------------------


def test_eight_bits_lose_little():
    model, ids = plain("llama"), tokens(4, 32)
    quantized = quantize(copy.deepcopy(model), ids, head="int8")
    report = quantized.wush_quantization.report
    losses = {name: group["relative_loss"] for name, group in report.items()}
    assert losses.pop("lm_head") < 1e-4 < 1e-3 < min(losses.values())
    assert report["lm_head"]["weight_error"] < 1e-4
    head = quantized.lm_head
    assert head.owner.weight_packed.shape == (97, 64) and head.owner.weight_scale.shape == (97, 2)
    assert torch.allclose(head.weight, model.lm_head.weight, rtol=0, atol=1e-3) and head.in_features == 64
    text = wc.explain(quantized, all=True)
    assert "head=int8" in text and "format=int8" in text and "97 x 64" in text


@torch.no_grad()
@pytest.mark.parametrize("activation", ["fp8", None])
def test_saved_loaded_compiled_exported(activation, tmp_path):
    """4 and 8 bits in one model: the head, and an MLP whose siblings are one product of 8 bits."""
    eight = {"format": "int8", "activation_format": activation}
    overrides = {"lm_head": eight, "*.1.mlp.*": eight}
    model, ids = quantize(plain("llama"), tokens(2, 16), overrides=overrides), tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    assert model.model.layers[1].mlp.up_proj.owner is model.model.layers[1].mlp.gate_proj.owner
    wc.save(model, tmp_path / "a")
    loaded = wc.load(tmp_path / "a")
    assert torch.equal(loaded(ids, use_cache=False).logits, expected) and same_tensors(loaded, model)
    wc.save(loaded, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert torch.equal(model.generate(ids, max_new_tokens=3), loaded.generate(ids, max_new_tokens=3))

    options = {"emulate_precision_casts": True} if emulates_rounding() else {}
    with wc.trace_graphs() as log:
        compiled = torch.compile(copy.deepcopy(model), backend="wush", options=options)
        assert_like_eager(
            lambda: compiled(ids, use_cache=False).logits,
            lambda: model(ids, use_cache=False).logits,
            exact=emulates_rounding(),
        )
    counts = log.graphs[0].snapshots[-1].counts
    assert counts["fp4_linear"] == 9
    quantizers = sum(count for name, count in counts.items() if name.endswith("transform_quantize"))
    assert quantizers == (9 if activation == "fp8" else 6)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    for inline in (False, True):
        program = torch.export.export(Logits(), (ids,), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
        wc.fuse(program, inline=inline)
        assert count_ops(program.graph).get("fp4_linear", 0) == (0 if inline else 9)
        found = program.module()(ids)
        if inline and activation == "fp8":
            # Sums of fp8 products are not exact, and here are added up in another order: a logit may round otherwise.
            assert (found != expected).sum() <= 2
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["fp8", None])
def test_any_module_of_any_size(activation):
    model = pair(format="int8", activation_format=activation)
    for rows in (0, 1, 129):
        x = pair_rows(rows)
        y = model(x)
        assert y.shape == x.shape and y.isfinite().all()


# -- tied heads ------------------------------------------------------------------------------------------------------


def tied(kind: str) -> torch.nn.Module:
    """A random model whose head is its embedding's parameter."""
    model = plain(kind)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return model


@torch.no_grad()
def test_a_tied_head_stays_one_tensor(tmp_path):
    original, ids = tied("llama"), tokens(2, 9)
    model = quantize(copy.deepcopy(original), tokens(2, 16), head="int8")
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, torch.nn.Embedding) and not list(embedding.parameters())
    assert "model.embed_tokens" not in model.wush_quantization.ignored
    rows = head.dequantize().bfloat16()
    assert torch.equal(embedding(ids), rows[ids]) and torch.equal(embedding.weight, rows)
    assert embedding(ids[:, :0]).shape == (2, 0, 64)
    assert original.config.tie_word_embeddings and not model.config.tie_word_embeddings

    expected = model(ids, use_cache=False).logits
    wc.save(model, tmp_path / "a")
    quantize(copy.deepcopy(original), tokens(2, 16), head="int8", out=tmp_path / "out")
    for loaded in (wc.load(tmp_path / "a"), wc.load(tmp_path / "a", model=tied("llama")), wc.load(tmp_path / "out")):
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)
        assert type(loaded.model.embed_tokens) is type(embedding)
        assert torch.equal(loaded.generate(ids, max_new_tokens=2), model.generate(ids, max_new_tokens=2))
    names = {name for name in wc.load(tmp_path / "a").state_dict() if "embed" in name or "lm_head" in name}
    assert names == {"lm_head.group.weight_packed", "lm_head.group.weight_scale"}
    compiled = torch.compile(copy.deepcopy(model), backend="wush")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_streamed_tied_head_is_the_same(tmp_path):
    original, data = tied("llama"), tokens(2, 16)
    original.save_pretrained(tmp_path / "model")
    wc.quantize_checkpoint(
        tmp_path / "model", [data], out=tmp_path / "streamed", head="int8", solver="rtn", progress=False
    )
    quantize(original, data, head="int8", out=tmp_path / "whole")
    streamed, whole = wc.load(tmp_path / "streamed"), wc.load(tmp_path / "whole")
    assert same_tensors(streamed, whole)


@torch.no_grad()
def test_an_embedding_that_scales_its_rows_keeps_them(tmp_path):
    """Gemma's embedding: the head is a copy in 8 bits."""
    original, ids = tied("gemma3"), tokens(2, 9)
    model = quantize(copy.deepcopy(original), tokens(2, 16), head="int8")
    assert torch.equal(model.get_input_embeddings().weight, original.lm_head.weight)
    assert model.lm_head.owner.format == "int8" and not model.config.tie_word_embeddings
    assert "copy of the head" in model.wush_quantization.ignored["model.embed_tokens"]
    expected = model(ids, use_cache=False).logits
    wc.save(model, tmp_path)
    for loaded in (wc.load(tmp_path), wc.load(tmp_path, model=tied("gemma3"))):
        assert torch.equal(loaded(ids, use_cache=False).logits, expected)


def test_gradients_pass_and_the_report_shows_eight_bits(tmp_path):
    model, ids = quantize(tied("llama"), tokens(2, 16), head="int8"), tokens(2, 5)
    x = model.model.embed_tokens(ids).float().requires_grad_()
    model.lm_head(x).sum().backward()
    torch.testing.assert_close(x.grad, model.lm_head.dequantize().sum(0).expand_as(x), rtol=1e-3, atol=1e-3)
    wc.save(model, tmp_path)
    page = read_contents(tmp_path, graphs=False)
    [head] = [facts for facts in page.groups if facts.name == "lm_head"]
    assert (head.rows, head.width) == (97, 64) and head.weights.codes[0][0] == -127
    assert any("INT8 with 16-bit activations on A100" in text for _, text in page.head)


def test_a_tied_head_of_four_bits_stays_as_it_is():
    with pytest.raises(ConfigError, match="lm_head is not quantized, weight is tied to model.embed_tokens"):
        quantize(tied("llama"), tokens(2, 16), overrides={"lm_head": {"format": "nvfp4"}})
