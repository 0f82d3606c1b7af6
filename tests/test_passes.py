"""Each pass alone and all together: the graph before and after, equal bits, no effect on foreign graphs."""

import pytest
import torch
from expecttest import TestCase as ExpectTest
from helpers import quantize
from models import quantized, tokens
from pass_harness import PassBackend, run
from torch import nn

from wush_compile import formats
from wush_compile.modules import named_groups
from wush_compile.ops.fused import GAINS
from wush_compile.passes import pipeline as passes

wush = torch.ops.wush
HADAMARD = torch.tensor([[1.0]])
while HADAMARD.shape[0] < 32:
    HADAMARD = torch.cat((torch.cat((HADAMARD, HADAMARD), 1), torch.cat((HADAMARD, -HADAMARD), 1))) / 2**0.5


class Quantizer(nn.Module):
    """`transform_quantize` of what a prologue makes of its input."""

    def __init__(self, prologue, dtype=torch.bfloat16):
        super().__init__()
        self.prologue = prologue
        self.register_buffer("transform", HADAMARD[None].to(dtype))

    def forward(self, *x):
        return wush.transform_quantize(self.prologue(*x), self.transform, None, "mxfp4", "absmax")


class Siblings(nn.Module):
    """Linears over row ranges of one buffer."""

    def __init__(self, ranges, rows=96, bias=True, dtype=torch.bfloat16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        codes, scales = formats.quantize(torch.randn(rows, 64, generator=generator), "mxfp4", "absmax")
        self.ranges = ranges
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.randn(rows, generator=generator).to(dtype) if bias else None)

    def forward(self, x):
        outputs = []
        for start, stop in self.ranges:
            xq, xs = wush.transform_quantize(x, None, None, "mxfp4", "absmax")
            bias = None if self.bias is None else self.bias[start:stop]
            outputs.append(
                wush.fp4_linear(
                    xq, xs, None, self.codes[start:stop], self.scales[start:stop], None, bias, None, "mxfp4", x.dtype
                )
            )
        return tuple(outputs)


def x_like(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- cse, merge_siblings ---------------------------------------------------------------------------------------------


def test_cse_leaves_one_quantizer_per_input():
    seen = run(Siblings([(0, 32), (32, 96)]), x_like(2, 5, 64), steps=[passes.cse])
    assert seen.counts_before == {"transform_quantize": 2, "fp4_linear": 2}
    assert seen.counts_after == {"transform_quantize": 1, "fp4_linear": 2}


def test_cse_tells_different_arguments_apart():
    def forward(x):
        return tuple(wush.transform_quantize(x, None, None, "mxfp4", rule)[1] for rule in ("absmax", "ocp", "absmax"))

    assert run(forward, x_like(3, 64), steps=[passes.cse]).counts_after == {"transform_quantize": 2}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranges", [[(0, 32), (32, 64), (64, 96)], [(64, 96), (0, 64)], [(0, 96)]])
def test_siblings_become_one_matmul_and_a_split(ranges, bias):
    seen = run(Siblings(ranges, bias=bias), x_like(2, 5, 64), steps=[passes.cse, passes.merge_siblings])
    assert seen.counts_after == {"transform_quantize": 1, "fp4_linear": 1}
    assert "slice" not in seen.after and "cat" not in seen.after
    assert ("split_with_sizes" in seen.after) == (len(ranges) > 1)


@pytest.mark.parametrize(
    "ranges", [[(0, 32), (32, 64)], [(0, 64), (32, 96)], [(0, 32), (64, 96)]], ids=["part", "overlap", "gap"]
)
def test_ranges_that_do_not_cover_the_buffer_stay(ranges):
    seen = run(Siblings(ranges), x_like(2, 5, 64), steps=[passes.cse, passes.merge_siblings])
    assert seen.counts_after["fp4_linear"] == 2


# -- prologues -------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, gain, dtype):
        super().__init__()
        self.gain, self.weight = gain, nn.Parameter(x_like(64, dtype=dtype, seed=1))

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.gain == "none":
            return normed.to(x.dtype)
        if self.gain == "rounded":
            return self.weight * normed.to(x.dtype)
        gain = self.weight.float() if self.gain == "wide" else 1.0 + self.weight.float()
        return (normed * gain).type_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", GAINS)
def test_rms_norm_fuses(gain, dtype):
    seen = run(Quantizer(Norm(gain, dtype), dtype), x_like(2, 5, 64, dtype=dtype), steps=[passes.fuse_norm])
    assert seen.counts_after == {"rms_norm_transform_quantize": 1}
    if dtype != torch.float32:  # in fp32 "wide" and "rounded" are one graph
        assert f"'{gain}'" in seen.after
    assert "rsqrt" not in seen.after


def test_rms_norm_fuses_with_eps_as_a_node():
    class Eps(Norm):
        eps = 1e-6

        def forward(self, x):
            wide = x.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return self.weight * normed.to(x.dtype)

    seen = run(Quantizer(Eps("rounded", torch.bfloat16)), x_like(2, 5, 64), steps=[passes.fuse_norm], dynamic=True)
    assert seen.counts_after == {"rms_norm_transform_quantize": 1}


def test_torch_norms_fuse():
    for norm, op in (
        (nn.RMSNorm(64, eps=1e-6), "rms_norm"),
        (nn.LayerNorm(64), "layer_norm"),
        (nn.LayerNorm(64, bias=False), "layer_norm"),
        (nn.LayerNorm(64, elementwise_affine=False), "layer_norm"),
    ):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        seen = run(Quantizer(norm.bfloat16()), x_like(2, 5, 64), steps=[passes.fuse_norm])
        assert seen.counts_after == {f"{op}_transform_quantize": 1}


@pytest.mark.parametrize("change", ["other dimension", "rounds early", "double", "read elsewhere"])
def test_norms_that_round_or_reduce_differently_stay(change):
    norm = Norm("rounded", torch.bfloat16)

    def forward(x):
        if change == "other dimension":
            wide = x.float()
            return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(0, keepdim=True) + 1e-6)).to(x.dtype)
        if change == "rounds early":
            return norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        if change == "double":
            wide = x.double()
            return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return norm(x)

    quantizer = Quantizer(forward)
    both = (lambda x: (quantizer(x), forward(x))) if change == "read elsewhere" else quantizer
    seen = run(both, x_like(5, 64), steps=[passes.cse, passes.fuse_norm])
    if change == "read elsewhere":  # two equal norms, of which the quantizer takes its own
        assert seen.counts_after["rms_norm_transform_quantize"] == 1
    else:
        assert seen.counts_after == {"transform_quantize": 1}


@pytest.mark.parametrize("dtype, gate_first", [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    "name, act",
    [
        ("silu", nn.functional.silu),
        ("gelu", nn.functional.gelu),
        ("gelu", lambda x: nn.functional.gelu(x, approximate="tanh")),
        ("silu", lambda x: x * torch.sigmoid(x.float()).to(x)),
    ],
)
def test_gated_activations_fuse(name, act, dtype, gate_first):
    def gated(gate, up):
        return act(gate) * up if gate_first else up * act(gate)

    seen = run(
        Quantizer(gated, dtype),
        x_like(2, 5, 64, dtype=dtype),
        x_like(2, 5, 64, dtype=dtype, seed=1),
        steps=[passes.fuse_activation],
    )
    spelled_out = name == "silu" and "sigmoid" in seen.before and dtype == torch.bfloat16 and "exp" not in seen.before
    assert seen.counts_after == {"transform_quantize" if spelled_out else f"{name}_mul_transform_quantize": 1}


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_activations_spelled_out_in_low_precision_stay(name):
    def sigmoid(x):
        return x * (1 / (1 + torch.exp(-x)))

    def tanh(x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))

    def silu(x):
        return x / (1 + torch.exp(-x))

    for act in {"sigmoid": (sigmoid, silu), "tanh": (tanh,)}[name]:
        seen = run(
            Quantizer(lambda gate, up, act=act: act(gate) * up),
            x_like(2, 5, 64),
            x_like(2, 5, 64, seed=1),
            steps=[passes.fuse_activation],
        )
        assert seen.counts_after == {"transform_quantize": 1}


# -- epilogues, cleanup ----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, after):
        super().__init__()
        codes, scales = formats.quantize(x_like(64, 64, dtype=torch.float32, seed=3), "mxfp4", "absmax")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.after = after

    def forward(self, x, *more):
        xq, xs = wush.transform_quantize(x, None, None, "mxfp4", "absmax")
        y = wush.fp4_linear(xq, xs, None, self.codes, self.scales, None, None, None, "mxfp4", x.dtype)
        return self.after(y, *more)


@pytest.mark.parametrize("after", [lambda y, r: y + r, lambda y, r: r + y])
def test_a_residual_becomes_an_argument(after):
    seen = run(Linear(after), x_like(2, 5, 64), x_like(2, 5, 64, seed=1), steps=[passes.fuse_epilogue])
    assert "add" not in seen.after


@pytest.mark.parametrize(
    "after, shape",
    [
        (lambda y, r: torch.add(y, r, alpha=2), (2, 5, 64)),
        (lambda y, r: y + r, (64,)),
        (lambda y, r: y + r, (2, 5, 1)),
        (lambda y, r: (y + r, y), (2, 5, 64)),
        (lambda y, r: y + r.float(), (2, 5, 64)),
    ],
    ids=["alpha", "bias in bf16", "broadcast", "read elsewhere", "dtype"],
)
def test_adds_that_round_differently_stay(after, shape):
    seen = run(Linear(after), x_like(2, 5, 64), x_like(*shape, seed=1), steps=[passes.fuse_epilogue])
    assert "add" in seen.after


def test_a_bias_in_fp32_becomes_an_argument():
    seen = run(
        Linear(lambda y, b: y + b),
        x_like(5, 64, dtype=torch.float32),
        x_like(64, dtype=torch.float32, seed=1),
        steps=[passes.fuse_epilogue],
    )
    assert "add" not in seen.after


def test_cleanup_drops_views_and_paddings_that_change_nothing():
    def forward(x):
        x = nn.functional.pad(x.reshape(2, 5, 64), (0, 0, 0, 0))[:, 0:5]
        return wush.transform_quantize(x.contiguous(), None, None, "mxfp4", "absmax")

    seen = run(forward, x_like(2, 5, 64), steps=[passes.cleanup])
    assert seen.after.count("\n") == 1  # the op and the return


# -- rewrite ---------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_a_linear_whose_input_is_another_linear_is_rewritten(solver):
    torch.manual_seed(0)
    model, x = Chain(), x_like(40, 64, dtype=torch.float32)
    expected = model(x)
    quantized_model = quantize(model, x, format="mxfp4", transform="hadamard", solver=solver)
    assert {name for name, _ in named_groups(quantized_model)} == {"up.group", "down.group"}
    assert (quantized_model(x) - expected).norm() < 0.4 * expected.norm()


# -- all of them -----------------------------------------------------------------------------------------------------


def test_passes_do_nothing_to_foreign_graphs():
    def forward(x, w):
        h = nn.functional.rms_norm(x, (64,), w).view(5, 64)
        return nn.functional.silu(h) * h + x, nn.functional.silu(h) * h

    seen = run(forward, x_like(5, 64), x_like(64, seed=1))
    assert seen.before == seen.after and not any(seen.changes.values())


@pytest.mark.parametrize("kind, dynamic", [("llama", False), ("qwen3", True), ("gemma3", True)])
def test_a_decoder_ends_with_four_quantizers_and_four_matmuls_a_layer(kind, dynamic):
    layers = 2 if kind == "llama" else 1
    seen = run(quantized(kind, layers=layers), tokens(2, 9), use_cache=False, dynamic=dynamic)
    assert seen.counts_before == {"transform_quantize": 7 * layers, "fp4_linear": 7 * layers}
    activation = "gelu_mul_transform_quantize" if kind == "gemma3" else "silu_mul_transform_quantize"
    assert seen.counts_after == {
        "rms_norm_transform_quantize": 2 * layers,
        activation: layers,
        "transform_quantize": layers,
        "fp4_linear": 4 * layers,
    }


class DecoderLayer(ExpectTest):
    maxDiff = None

    def test_llama(self):
        if not torch.__version__.startswith("2.13"):
            self.skipTest("needs PyTorch 2.13: AOTAutograd's graph of attention differs between releases")
        backend = PassBackend()
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(quantized("llama", layers=1), backend=backend, dynamic=True)(tokens(2, 9), use_cache=False)
        self.assertExpectedInline(
            backend.text(backend.graph, layer=0),
            """\
rms_norm_transform_quantize = wush.rms_norm_transform_quantize(embedding, input_layernorm.weight, 0.0, convert_element_type_6, 'rounded', self_attn.q_proj.group.input_transform, None, 'mxfp4', 'absmax')  # (u8[s0, s1, 32], u8[s0, s1, 2])
fp4_linear = wush.fp4_linear(rms_norm_transform_quantize[0], rms_norm_transform_quantize[1], None, self_attn.q_proj.group.weight_packed, self_attn.q_proj.group.weight_scale, None, None, None, 'mxfp4', bf16)  # bf16[s0, s1, 128]
split_with_sizes = aten.split_with_sizes(fp4_linear, [64, 32, 32], -1)  # (bf16[s0, s1, 64], bf16[s0, s1, 32], bf16[s0, s1, 32])
view_1 = aten.view(split_with_sizes[0], [s0, s1, -1, 16])  # bf16[s0, s1, 4, 16]
permute = aten.permute(view_1, [0, 2, 1, 3])  # bf16[s0, 4, s1, 16]
view_2 = aten.view(split_with_sizes[1], [s0, s1, -1, 16])  # bf16[s0, s1, 2, 16]
permute_1 = aten.permute(view_2, [0, 2, 1, 3])  # bf16[s0, 2, s1, 16]
view_3 = aten.view(split_with_sizes[2], [s0, s1, -1, 16])  # bf16[s0, s1, 2, 16]
permute_2 = aten.permute(view_3, [0, 2, 1, 3])  # bf16[s0, 2, s1, 16]
unsqueeze_12 = aten.unsqueeze(convert_element_type_4, 1)  # bf16[1, 1, s1, 16]
unsqueeze_13 = aten.unsqueeze(convert_element_type_5, 1)  # bf16[1, 1, s1, 16]
mul_3 = aten.mul(permute, unsqueeze_12)  # bf16[s0, 4, s1, 16]
slice_7 = aten.slice(permute, 3, 0, 8)  # bf16[s0, 4, s1, 8]
slice_8 = aten.slice(permute, 3, 8, 9223372036854775807)  # bf16[s0, 4, s1, 8]
neg = aten.neg(slice_8)  # bf16[s0, 4, s1, 8]
cat_1 = aten.cat([neg, slice_7], -1)  # bf16[s0, 4, s1, 16]
mul_4 = aten.mul(cat_1, unsqueeze_13)  # bf16[s0, 4, s1, 16]
add_3 = aten.add(mul_3, mul_4)  # bf16[s0, 4, s1, 16]
mul_5 = aten.mul(permute_1, unsqueeze_12)  # bf16[s0, 2, s1, 16]
slice_9 = aten.slice(permute_1, 3, 0, 8)  # bf16[s0, 2, s1, 8]
slice_10 = aten.slice(permute_1, 3, 8, 9223372036854775807)  # bf16[s0, 2, s1, 8]
neg_1 = aten.neg(slice_10)  # bf16[s0, 2, s1, 8]
cat_2 = aten.cat([neg_1, slice_9], -1)  # bf16[s0, 2, s1, 16]
mul_6 = aten.mul(cat_2, unsqueeze_13)  # bf16[s0, 2, s1, 16]
add_4 = aten.add(mul_5, mul_6)  # bf16[s0, 2, s1, 16]
slice_11 = aten.slice(add_4, 0, 0, 9223372036854775807)  # bf16[s0, 2, s1, 16]
unsqueeze_14 = aten.unsqueeze(slice_11, 2)  # bf16[s0, 2, 1, s1, 16]
slice_12 = aten.slice(unsqueeze_14, 3, 0, 9223372036854775807)  # bf16[s0, 2, 1, s1, 16]
expand_4 = aten.expand(slice_12, [s0, 2, 2, s1, 16])  # bf16[s0, 2, 2, s1, 16]
clone_2 = aten.clone(expand_4, memory_format=torch.contiguous_format)  # bf16[s0, 2, 2, s1, 16]
view_4 = aten.view(clone_2, [s0, 4, s1, 16])  # bf16[s0, 4, s1, 16]
slice_13 = aten.slice(permute_2, 0, 0, 9223372036854775807)  # bf16[s0, 2, s1, 16]
unsqueeze_15 = aten.unsqueeze(slice_13, 2)  # bf16[s0, 2, 1, s1, 16]
slice_14 = aten.slice(unsqueeze_15, 3, 0, 9223372036854775807)  # bf16[s0, 2, 1, s1, 16]
expand_5 = aten.expand(slice_14, [s0, 2, 2, s1, 16])  # bf16[s0, 2, 2, s1, 16]
clone_3 = aten.clone(expand_5, memory_format=torch.contiguous_format)  # bf16[s0, 2, 2, s1, 16]
view_5 = aten.view(clone_3, [s0, 4, s1, 16])  # bf16[s0, 4, s1, 16]
scalar_tensor = aten.scalar_tensor(-inf, dtype=bf16, device=device(type='cpu'))  # bf16[]
scalar_tensor_1 = aten.scalar_tensor(0.0, dtype=bf16, layout=torch.strided, device=device(type='cpu'))  # bf16[]
where = aten.where(expand_2, scalar_tensor_1, scalar_tensor)  # bf16[s0, 1, s1, s1]
_scaled_dot_product_flash_attention_for_cpu = aten._scaled_dot_product_flash_attention_for_cpu(add_3, view_4, view_5, attn_mask=where, scale=0.25)  # (bf16[s0, 4, s1, 16], f32[s0, 4, s1])
view_6 = aten.view(_scaled_dot_product_flash_attention_for_cpu[0], [s0, 4, s1, 16])  # bf16[s0, 4, s1, 16]
permute_3 = aten.permute(view_6, [0, 2, 1, 3])  # bf16[s0, s1, 4, 16]
view_7 = aten.view(permute_3, [s0, s1, -1])  # bf16[s0, s1, 64]
transform_quantize = wush.transform_quantize(view_7, self_attn.o_proj.group.input_transform, None, 'mxfp4', 'absmax')  # (u8[s0, s1, 32], u8[s0, s1, 2])
fp4_linear_1 = wush.fp4_linear(transform_quantize[0], transform_quantize[1], None, self_attn.o_proj.group.weight_packed, self_attn.o_proj.group.weight_scale, None, None, embedding, 'mxfp4', bf16)  # bf16[s0, s1, 64]
rms_norm_transform_quantize_1 = wush.rms_norm_transform_quantize(fp4_linear_1, post_attention_layernorm.weight, 0.0, convert_element_type_7, 'rounded', mlp.gate_proj.group.input_transform, None, 'mxfp4', 'absmax')  # (u8[s0, s1, 32], u8[s0, s1, 2])
fp4_linear_2 = wush.fp4_linear(rms_norm_transform_quantize_1[0], rms_norm_transform_quantize_1[1], None, mlp.gate_proj.group.weight_packed, mlp.gate_proj.group.weight_scale, None, None, None, 'mxfp4', bf16)  # bf16[s0, s1, 256]
split_with_sizes_1 = aten.split_with_sizes(fp4_linear_2, [128, 128], -1)  # (bf16[s0, s1, 128], bf16[s0, s1, 128])
silu_mul_transform_quantize = wush.silu_mul_transform_quantize(split_with_sizes_1[0], split_with_sizes_1[1], mlp.down_proj.group.input_transform, None, 'mxfp4', 'absmax')  # (u8[s0, s1, 64], u8[s0, s1, 4])
fp4_linear_3 = wush.fp4_linear(silu_mul_transform_quantize[0], silu_mul_transform_quantize[1], None, mlp.down_proj.group.weight_packed, mlp.down_proj.group.weight_scale, None, None, fp4_linear_1, 'mxfp4', bf16)  # bf16[s0, s1, 64]""",  # noqa: E501
        )
