"""What encoders and older decoders need: activations without a gate, norms that others read, dropout, residuals."""

import functools

import pytest
import torch
from expecttest import TestCase as ExpectTest
from helpers import emulates_rounding, quantize
from models import VOCABULARY, tokens
from pass_harness import run
from test_passes import Linear, Norm, Quantizer, x_like
from torch import nn
from torch.nn import functional as F

from wush_compile.graphs.printing import count_ops
from wush_compile.ops.fused import ACTIVATIONS, GAINS
from wush_compile.passes import pipeline as passes

wush = torch.ops.wush
EMULATED = emulates_rounding()

# -- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_without_a_gate_fuse(kind, dtype):
    x = x_like(2, 5, 64, dtype=dtype) * 3
    seen = run(Quantizer(ACTIVATIONS[kind], dtype), x, steps=[passes.fuse_activation])
    assert seen.counts_after == {"activation_transform_quantize": 1}
    assert f", '{kind}', " in seen.after and seen.after.count("\n") == 1


@pytest.mark.parametrize("square", [lambda r: r.pow(2), lambda r: r * r, torch.square])
def test_relu_is_squared_in_any_way(square):
    seen = run(Quantizer(lambda x: square(F.relu(x))), x_like(5, 64), steps=[passes.fuse_activation])
    assert "'relu2'" in seen.after


@pytest.mark.parametrize(
    "near",
    [
        lambda x: x * torch.sigmoid(x),
        lambda x: x * torch.sigmoid(1.7 * x),
        lambda x: F.relu(x) * x,
        lambda x: F.relu(x) * F.relu(-x),
        lambda x: F.relu(x.float()).to(x.dtype),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0)))),
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    ],
    ids=["rounds twice", "other factor", "one relu", "two relus", "in fp32", "shorter constant", "product"],
)
def test_what_only_looks_like_an_activation_stays(near):
    seen = run(Quantizer(near), x_like(5, 64), steps=[passes.fuse_activation])
    assert seen.counts_after == {"transform_quantize": 1}


def clamped_gate(x, first=0, limit=7.0, least=-7.0, alpha=1.702, one=1):
    """gpt-oss' gate, as transformers writes it, or something near."""
    gate, up = x[..., first::2].clamp(min=None, max=limit), x[..., 1 - first :: 2].clamp(min=least, max=limit)
    return (up + one) * (gate * torch.sigmoid(gate * alpha))


@pytest.mark.parametrize("limit", [7.0, 2.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_clamped_gate_of_gpt_oss_fuses(dtype, limit):
    x = 3 * x_like(2, 5, 128, dtype=dtype)
    gate = functools.partial(clamped_gate, limit=limit, least=-limit)
    seen = run(Quantizer(gate, dtype), x, steps=[passes.fuse_activation])
    assert seen.counts_after == {"swiglu_oai_transform_quantize": 1}
    with torch.no_grad():
        program = torch.export.export(Quantizer(gate, dtype), (x,))
    assert passes.fuse_activation(program.graph) == 1 and "slice" not in str(program.graph)


@pytest.mark.parametrize("near", [dict(first=1), dict(least=-6.0), dict(alpha=1.7), dict(one=2)], ids=str)
def test_what_only_looks_like_a_clamped_gate_stays(near):
    seen = run(Quantizer(functools.partial(clamped_gate, **near)), x_like(5, 128), steps=[passes.fuse_activation])
    assert seen.counts_after == {"transform_quantize": 1}


def test_an_activation_that_is_read_elsewhere_stays():
    def forward(x):
        h = F.gelu(x)
        return wush.transform_quantize(h, None, None, "mxfp4", "absmax"), h

    assert run(forward, x_like(5, 64), steps=[passes.fuse_activation]).counts_after == {"transform_quantize": 1}


# -- norms that something else reads ---------------------------------------------------------------------------------


class Graphs(ExpectTest):
    maxDiff = None

    def test_a_kept_norm(self):
        norm = nn.LayerNorm(64).bfloat16()

        def forward(x):
            h = norm(x)
            return wush.transform_quantize(h, None, None, "mxfp4", "absmax"), h * 2

        self.assertExpectedInline(
            run(forward, x_like(2, 5, 64), steps=[passes.fuse_norm]).after,
            """\
layer_norm_keep_transform_quantize = wush.layer_norm_keep_transform_quantize(x, norm.weight, norm.bias, 1e-05, None, None, None, 'mxfp4', 'absmax')  # (u8[2, 5, 32], u8[2, 5, 2], bf16[2, 5, 64])
mul = aten.mul(layer_norm_keep_transform_quantize[2], 2)  # bf16[2, 5, 64]
return (layer_norm_keep_transform_quantize[0], layer_norm_keep_transform_quantize[1], mul)""",  # noqa: E501
        )

    def test_a_clamped_gate(self):
        def forward(x):
            return wush.transform_quantize(clamped_gate(x), None, None, "mxfp4", "absmax")

        self.assertExpectedInline(
            run(forward, x_like(5, 128), steps=[passes.fuse_activation]).after,
            """\
swiglu_oai_transform_quantize = wush.swiglu_oai_transform_quantize(x, 7.0, None, None, 'mxfp4', 'absmax')  # (u8[5, 32], u8[5, 2])
return (swiglu_oai_transform_quantize[0], swiglu_oai_transform_quantize[1])""",  # noqa: E501
        )

    def test_dropout_and_a_residual(self):
        block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)).bfloat16().eval()
        model = quantize(block, x_like(2, 5, 64), transform="hadamard", activation_scale_rule="absmax")
        self.assertExpectedInline(
            run(lambda x: x + model(x), x_like(2, 5, 64)).after,
            """\
transform_quantize = wush.transform_quantize(x, model.0.group.input_transform, None, 'mxfp4', 'absmax')  # (u8[2, 5, 32], u8[2, 5, 2])
fp4_linear = wush.fp4_linear(transform_quantize[0], transform_quantize[1], None, model.0.group.weight_packed, model.0.group.weight_scale, model.0.group.weight_global_scale, model.0.group.bias, x, 'mxfp4', bf16)  # bf16[2, 5, 64]
return (fp4_linear)""",  # noqa: E501
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_norm_that_others_read_is_kept(norm, dynamic):
    """Two quantizers and a product read it: the first quantizer takes the norm in, the others read what it keeps."""
    norm = Norm("rounded", torch.bfloat16) if norm == "rms" else nn.LayerNorm(64).bfloat16()
    router, transform = x_like(8, 64, seed=2), x_like(1, 32, 32, seed=3)

    def forward(x):
        h = norm(x)
        plain = wush.transform_quantize(h, None, None, "mxfp4", "absmax")
        return plain, wush.transform_quantize(h, transform, None, "mxfp4", "absmax"), F.linear(h, router), h

    seen = run(forward, x_like(2, 5, 64), steps=[passes.fuse_norm], dynamic=dynamic)
    name = "rms_norm" if isinstance(norm, Norm) else "layer_norm"
    assert seen.counts_after == {f"{name}_keep_transform_quantize": 1, "transform_quantize": 1}
    assert "rsqrt" not in seen.after


def test_a_norm_is_not_kept_before_the_quantizer_has_its_arguments():
    norm = Norm("rounded", torch.bfloat16)

    def forward(x):
        h = norm(x)
        return wush.transform_quantize(h, h[0, :32, None] * h[0, None, :32][None], None, "mxfp4", "absmax"), h

    assert run(forward, x_like(5, 64), steps=[passes.fuse_norm]).counts_after == {"transform_quantize": 1}


# -- dropout, residuals ----------------------------------------------------------------------------------------------


def test_copies_that_can_be_told_apart_stay():
    """Of an input, which may be written to later; and one that is returned, alone or as a view."""

    def forward(x):
        y = wush.transform_quantize(x * 2, None, None, "mxfp4", "absmax")
        z = x * 3
        return y, x.clone(), z.clone(), z, z.clone().view(-1)

    seen = run(forward, x_like(5, 64), steps=[passes.drop_identities])
    assert seen.after.count("aten.clone") == 3 and not any(seen.changes.values())


def test_dropout_in_an_exported_program_goes():
    class Forward(Quantizer):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.1, self.training))

    for training in (False, True):
        program = torch.export.export(Forward(lambda x: x).train(training), (x_like(5, 64),))
        assert passes.drop_identities(program.graph) == (not training)
        assert count_ops(program.graph) == {"transform_quantize": 1}
        assert ("dropout" in str(program.graph)) == training


def test_a_residual_in_another_layout_is_copied_once():
    """The sum is dense, so the next layer's residual is too, and a copy that the graph has serves both readers."""
    first, second = Linear(lambda y, r: y + r), Linear(lambda y, r: r + y)

    def forward(x, r):
        r = r.transpose(0, 1) * 2
        h = first(r.contiguous(), r)
        return second(h, h).view(-1)

    seen = run(forward, x_like(2, 5, 64), x_like(5, 2, 64, seed=1), steps=[passes.fuse_epilogue])
    assert "aten.add" not in seen.after and seen.after.count("aten.clone") == 1


def test_a_repeated_residual_stays():
    model = Linear(lambda y, r: y + r.expand(2, 5, 64))
    assert "aten.add" in run(model, x_like(2, 5, 64), x_like(1, 1, 64, seed=1), steps=[passes.fuse_epilogue]).after


# -- models ----------------------------------------------------------------------------------------------------------


def bert():
    from transformers import BertConfig, BertModel

    return BertModel, BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )


def gpt2():
    from transformers import GPT2Config, GPT2Model

    return GPT2Model, GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=None,
        use_cache=False,
    )


def opt():
    from transformers import OPTConfig, OPTModel

    return OPTModel, OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )


def vision(name: str):
    import transformers

    model, config = getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")
    return model, config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


# name -> what makes it, the activation, and how many quantizers end up how, for two layers
MODELS = {
    "bert": (bert, "gelu", {"layer_norm_keep_transform_quantize": 4, "transform_quantize": 3}),
    "gpt2": (gpt2, "gelu_new", {"layer_norm_transform_quantize": 4, "transform_quantize": 2}),
    "opt": (opt, "relu", {"layer_norm_transform_quantize": 4, "transform_quantize": 2}),
    "vit": (lambda: vision("ViT"), "gelu", {"layer_norm_transform_quantize": 4, "transform_quantize": 3}),
    "clip": (
        lambda: vision("CLIPVision"),
        "quick_gelu",
        {"layer_norm_transform_quantize": 4, "transform_quantize": 2},
    ),
    "siglip": (
        lambda: vision("SiglipVision"),
        "gelu_tanh",
        {"layer_norm_transform_quantize": 5, "transform_quantize": 2, "activation_transform_quantize": 3},
    ),
}


def model_and_input(name: str) -> tuple[nn.Module, torch.Tensor]:
    model_class, config = MODELS[name][0]()
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.bfloat16).eval()
    x = torch.randn(2, 3, 32, 32).bfloat16() if hasattr(config, "image_size") else tokens(2, 16)
    rules = {"weight_scale_rule": "absmax", "activation_scale_rule": "absmax"}
    return quantize(model, x, transform="hadamard", **rules), x


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_ends_with_four_quantizers_and_four_matmuls(name):
    """BERT's and ViT's pooler is one more of each, SigLIP's head has an MLP of its own."""
    model, x = model_and_input(name)
    _, kind, quantizers = MODELS[name]
    seen = run(model, x)
    products = seen.counts_after.pop("fp4_linear")
    assert dict(seen.counts_after) == {"activation_transform_quantize": 2} | quantizers
    assert products == sum(quantizers.values()) + (2 if name != "siglip" else 0)
    assert seen.after.count(f"'{kind}'") == seen.counts_after["activation_transform_quantize"]
    residuals = 2 * model.config.num_hidden_layers + (name == "siglip")
    assert seen.changes["fuse_epilogue"] == residuals


@pytest.mark.skipif(not EMULATED, reason="Inductor's C++ rounds less often than eager")
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "opt"])
def test_compiled_models_give_the_bits_of_eager(name):
    model, x = model_and_input(name)
    torch._dynamo.reset()
    options = {"emulate_precision_casts": True}
    with torch.no_grad():
        actual = torch.compile(model, backend="wush", fullgraph=True, dynamic=False, options=options)(x)
        assert torch.equal(actual.last_hidden_state, model(x).last_hidden_state)


def test_in_export_activations_are_whole_ops():
    for kind, activation in ACTIVATIONS.items():
        model, x = Quantizer(activation), x_like(5, 64)
        program = torch.export.export(model, (x,))
        passes.run(program.graph, passes.EXECUTION)
        assert count_ops(program.graph) == {"activation_transform_quantize": 1}, kind
        assert all(map(torch.equal, program.module()(x), model(x))), kind
        passes.run(program.graph, passes.PACKAGING)
        assert not count_ops(program.graph), kind


def test_where_a_compiled_gemma_can_differ_from_eager():
    """The mean in a norm that no quantizer follows: Inductor's C++ adds up its row in another order than ATen.

    All else in the norm has eager's bits, so the first node that differs is `aten.mean`, by a few units of the last
    place in fp32. After the rounding to bf16, about one value of 10 000 differs (width 96); in most tiny models, none.
    """
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    norm, x = Gemma3RMSNorm(96, eps=1e-6).bfloat16(), x_like(200, 96)
    nn.init.normal_(norm.weight, std=0.1)

    def mean(x):
        return x.float().pow(2).mean(-1, keepdim=True)

    def rest(x, mean):
        normed = x.float() * torch.rsqrt(mean + norm.eps)
        return (normed * (1.0 + norm.weight.float())).type_as(x)

    torch._dynamo.reset()
    options = {"emulate_precision_casts": True}
    with torch.no_grad():
        eager = mean(x)
        assert torch.equal(rest(x, eager), norm(x))
        torch.testing.assert_close(torch.compile(mean, options=options)(x), eager, rtol=1e-6, atol=0)
        if EMULATED:
            assert torch.equal(torch.compile(rest, options=options)(x, eager), norm(x))
        differing = (torch.compile(norm, options=options)(x) != norm(x)).float().mean()
        assert differing <= 1e-3 or not EMULATED


# -- norms of sums that are not rounded ------------------------------------------------------------------------------


class AddNorm(Norm):
    """The norm of x + residual and that sum, as vLLM's models compute them: the norm reads the sum before it rounds."""

    def forward(self, x, residual):
        total = x.float() + residual.float()
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.gain == "rounded":
            normed = self.weight * normed.to(x.dtype)
        elif self.gain != "none":
            gain = self.weight.float() if self.gain == "wide" else 1.0 + self.weight.float()
            normed = (normed * gain).to(x.dtype)
        return normed.to(x.dtype), total.to(x.dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", GAINS)
def test_a_norm_takes_its_sum_in(gain, dtype, dynamic):
    first, second = AddNorm(gain, dtype), AddNorm(gain, dtype)

    def forward(x, residual):
        h, residual = first(x, residual)
        codes, scales = wush.transform_quantize(h, None, None, "mxfp4", "absmax")
        h, residual = second(residual * 2, residual)
        return codes, scales, residual, wush.transform_quantize(h, None, None, "mxfp4", "absmax")

    seen = run(
        forward,
        x_like(2, 5, 64, dtype=dtype),
        x_like(2, 5, 64, dtype=dtype, seed=1),
        steps=[passes.fuse_norm],
        dynamic=dynamic,
    )
    # In fp32 the sum is the residual itself, which the op without a sum reads.
    op = "rms_norm_transform_quantize" if dtype == torch.float32 else "add_rms_norm_transform_quantize"
    assert seen.counts_after == {op: 2} and "rsqrt" not in seen.after
    assert dtype == torch.float32 or "convert_element_type" not in seen.after


@pytest.mark.parametrize("change", ["broadcast", "read elsewhere", "rounded first", "other dtype", "other layout"])
def test_sums_that_only_look_alike(change):
    norm = AddNorm("rounded", torch.bfloat16)
    transform = x_like(1, 32, 32, seed=3)

    def forward(x, residual):
        if change == "rounded first":
            residual, x = x + residual, torch.zeros_like(x)
            wide = residual.float()
            h = norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        elif change == "other dtype":
            h, residual = norm(x, residual.half())
        elif change == "other layout":
            h, residual = norm(x.transpose(0, 1), residual.transpose(0, 1))
        else:
            h, residual = norm(x, residual[:1] if change == "broadcast" else residual)
        quantized = wush.transform_quantize(h, transform, None, "mxfp4", "absmax")
        return quantized, residual, h if change == "read elsewhere" else None

    seen = run(forward, x_like(2, 5, 64), x_like(2, 5, 64, seed=1), steps=[passes.fuse_norm])
    assert seen.counts_after == {
        "rms_norm_transform_quantize" if change == "rounded first" else "transform_quantize": 1
    }
