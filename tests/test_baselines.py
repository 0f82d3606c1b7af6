"""Baselines against the definitions of their papers, each on one layer, and as rewrites that change nothing."""

import copy
import math

import pytest
import torch
from models import plain, tokens
from torch import nn

import wush_compile as wc
from wush_compile import formats
from wush_compile.baselines import METHODS, hadamard, learn, quantize_by, rotate, smooth, stream
from wush_compile.capture.export import capture
from wush_compile.errors import CaptureError, ConfigError, DataError

KINDS = ("llama", "qwen3")


def model_of(kind, tied=False):
    """A random model in fp32 whose norms have weights; its channels differ in size."""
    model = plain(kind, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.rand(parameter.shape, generator=generator) * 3 + 0.2
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


# -- Hadamard matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 40, 48, 60, 140, 576, 1536])
def test_hadamard_matrices_of_any_size(size):
    matrix = torch.kron(*hadamard.factors(size))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs() * math.sqrt(size), torch.ones(size, size, dtype=torch.float64), atol=1e-12)


def test_where_paley_has_no_matrix_the_odd_part_is_random_and_orthogonal():
    matrix = torch.kron(*hadamard.factors(43 * 16))
    assert torch.allclose(matrix @ matrix.T, torch.eye(688, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() < 0.5 and torch.equal(matrix, torch.kron(*hadamard.factors(688)))


@pytest.mark.parametrize("size", [64, 96])
def test_the_product_at_run_time_is_that_with_the_matrix(size):
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(0))
    rotation = hadamard.Rotation(size, x.device)
    assert torch.allclose(rotation(x).double(), x.double() @ rotation.matrix(), atol=1e-5)
    assert rotation(x.bfloat16()).dtype == torch.bfloat16


# -- SmoothQuant ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 0.85])
def test_smoothquant_is_equation_4_of_its_paper(alpha):
    model, ids = model_of("llama"), tokens(3, 16)
    layer, before = model.model.layers[0], copy.deepcopy(model.model.layers[0])
    seen = []
    handle = layer.self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    reference = logits(model, ids)
    handle.remove()
    assert smooth(model, [ids[:1], ids[1:]], alpha) == 4  # two layers of two norms; the head is not quantized
    assert torch.allclose(logits(model, ids), reference, atol=2e-6)
    linears = [(layer.self_attn.get_submodule(n), before.self_attn.get_submodule(n)) for n in ("q_proj", "v_proj")]
    largest = seen[0].flatten(0, 1).abs().amax(0)
    weights = [before.self_attn.get_submodule(n).weight for n in ("q_proj", "k_proj", "v_proj")]
    s = largest**alpha / torch.cat(weights).abs().amax(0) ** (1 - alpha)
    for new, old in linears:
        assert torch.allclose(new.weight, old.weight * s, rtol=1e-5)
    assert torch.allclose(layer.input_layernorm.weight, before.input_layernorm.weight / s, rtol=1e-5)
    assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_smoothing_leaves_a_tied_head_and_gemmas_offset_alone():
    for kind, tied in (("llama", True), ("gemma3", False)):
        model, ids = model_of(kind, tied), tokens(2, 16)
        reference, head = logits(model, ids), model.lm_head.weight.clone()
        smooth(model, [ids])
        assert torch.allclose(logits(model, ids), reference, atol=5e-6) and torch.equal(model.lm_head.weight, head)


def test_smoothing_evens_the_channels_of_a_layer():
    """With α = 1/2 inputs and weights get the same largest values, channel by channel."""
    model, ids = model_of("llama"), tokens(4, 16)
    smooth(model, [ids], 0.5)
    seen = []
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, ids)
    mlp = model.model.layers[0].mlp
    weights = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).abs().amax(0)
    assert torch.allclose(seen[0].flatten(0, 1).abs().amax(0), weights, rtol=1e-4)


# -- QuaRot --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, tied", [("llama", False), ("llama", True), ("qwen3", False)])
@pytest.mark.parametrize("online", [True, False])
def test_a_rotation_changes_no_output(kind, tied, online):
    model, ids = model_of(kind, tied), tokens(2, 16)
    reference, original = logits(model, ids), copy.deepcopy(model)
    found = rotate(model, [(ids,)], online=online, seed=3)
    assert torch.allclose(logits(model, ids), reference, atol=5e-6)
    assert len(found.norms) == 5 and len(found.writers) == 4 and found.embeddings == ("model.embed_tokens",)
    # W_down -> Rᵀ W_down H, W_up -> W_up diag(norm) R, as in the paper's §4.
    r = hadamard.random_hadamard(64, 3)
    new, old = model.model.layers[1], original.model.layers[1]
    h = walsh(128) if online else torch.eye(128, dtype=torch.float64)
    assert torch.allclose(new.mlp.down_proj.weight.double(), r.T @ old.mlp.down_proj.weight.double() @ h, atol=1e-6)
    folded = old.mlp.up_proj.weight.double() * old.post_attention_layernorm.weight.double()
    assert torch.allclose(new.mlp.up_proj.weight.double(), folded @ r, atol=1e-5)
    assert torch.equal(new.post_attention_layernorm.weight, torch.ones(64))
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def walsh(size):
    """The normalized Walsh-Hadamard matrix by butterflies, independently of the library's."""
    x = torch.eye(size, dtype=torch.float64)
    step = 1
    while step < size:
        pairs = x.view(size, -1, 2, step)
        x = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(size, size)
        step *= 2
    return x / math.sqrt(size)


def test_a_rotated_model_is_quantized_with_its_products_at_run_time():
    model, ids = model_of("llama"), tokens(8, 32)
    reference = logits(model, ids)
    quantized = quantize_by("quarot", copy.deepcopy(model), [ids], "nvfp4", progress=False)
    layer = quantized.model.layers[0]
    assert type(layer.mlp.down_proj).__name__ == "WushLinear" and layer.mlp.down_proj_rotation is not None
    copied = copy.deepcopy(quantized)
    copied.model.layers[0].mlp.down_proj_rotation.a.zero_()  # the copy's hook goes through the copy's own rotation
    plain_rounding = quantize_by("rtn", copy.deepcopy(model), [ids], "nvfp4", progress=False)
    errors = [float((logits(m, ids) - reference).square().mean()) for m in (quantized, plain_rounding, copied)]
    assert errors[0] < errors[1] < 0.1 * float(reference.square().mean()) and errors[2] > errors[0]


def test_a_stream_that_cannot_be_rotated_says_why():
    class Norms(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.embed, self.norm, self.up, self.out = nn.Embedding(9, 64), norm, nn.Linear(64, 64), nn.Linear(64, 9)
            self.act = nn.Tanh()

        def forward(self, ids):
            x = self.embed(ids)
            x = x + self.up(self.norm(x))
            return self.out(self.act(x) if isinstance(self.norm, nn.Identity) else x)

    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(CaptureError, match="LayerNorms"):
        rotate(Norms(nn.LayerNorm(64)), [(ids,)])
    with pytest.raises(CaptureError, match="reads the residual stream"):
        rotate(Norms(nn.Identity()), [(ids,)])
    model = Norms(nn.RMSNorm(64))
    reference = model(ids)
    assert rotate(model, [(ids,)]).readers == ("out",)
    assert torch.allclose(model(ids), reference, atol=1e-5)
    with pytest.raises(DataError, match="has 64 channels"):
        rotate(Norms(nn.RMSNorm(64)), [(ids,)], rotation=torch.eye(32))


def test_layer_norms_are_found_and_smoothed():
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    nn.init.uniform_(model[0].weight), nn.init.normal_(model[0].bias)
    x = torch.randn(4, 64) * torch.linspace(0.1, 9, 64)
    reference = model(x)
    [norm] = stream.find_norms(capture(model, [(x,)]).graph_module.graph)
    assert norm.kind == "layer" and norm.readers == ("1",)
    assert smooth(model, [x]) == 1 and torch.allclose(model(x), reference, atol=1e-5)


# -- SpinQuant -----------------------------------------------------------------------------------------------------


def test_a_cayley_step_is_that_of_the_published_iteration():
    """Cayley SGD of Li et al. (2020), Algorithm 1: Y = X + α/2 W (X + Y), iterated to its fixed point."""
    generator = torch.Generator().manual_seed(0)
    r = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=generator))[0]
    gradient = torch.randn(24, 24, dtype=torch.float64, generator=generator)
    x, g = r.T, gradient.T
    w_hat = -g @ x.T + 0.5 * x @ (x.T @ g @ x.T)
    w = w_hat - w_hat.T
    rate = min(1.5, 1 / float(w.abs().sum(0).max()))
    y = x
    for _ in range(200):
        y = x + rate / 2 * w @ (x + y)
    step = learn.cayley_step(r, gradient, 1.5)
    assert torch.allclose(step, y.T, atol=1e-7)
    assert torch.allclose(step @ step.T, torch.eye(24, dtype=torch.float64), atol=1e-12)
    # It goes downhill: the change against the gradient is negative.
    assert float((gradient * (learn.cayley_step(r, gradient, 1e-4) - r)).sum()) < 0


def test_a_learned_rotation_lowers_the_loss_and_stays_orthogonal():
    model, ids = model_of("llama", tied=True), tokens(4, 32)
    reference, before, losses = logits(model, ids), copy.deepcopy(model.state_dict()), []
    r = learn.learn_rotation(model, [(ids,)], "mxfp4", steps=12, progress=False, losses=losses)
    assert torch.allclose(r @ r.T, torch.eye(64, dtype=torch.float64), atol=1e-9)
    assert sum(losses[-3:]) < sum(losses[:3]) and len(losses) == 12
    assert not torch.allclose(r, hadamard.random_hadamard(64, 0), atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rotate(model, [(ids,)], r)
    assert torch.allclose(logits(model, ids), reference, atol=5e-6)


# -- Four Over Six -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16), (64, 128)])
def test_four_over_six_takes_the_better_of_two_scales(shape):
    """Its §3: a group is scaled so that its largest value becomes 6 or 4, whichever has the less squared error."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3
    g = torch.tensor([16.0])
    recipe = METHODS["four-over-six"].configuration("nvfp4").recipe
    assert recipe.transform == "identity" and recipe.solver == "rtn"
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    groups = x.double().view(-1, 16)
    errors = []
    for top in (6.0, 4.0):
        scale = (groups.abs().amax(-1, keepdim=True) * 16 / top).float().to(torch.float8_e4m3fn).double() / 16
        values = groups / scale
        nearest = grid[(values.abs()[..., None] - grid).abs().argmin(-1)] * values.sign()
        errors.append((nearest * scale - groups).square().sum(-1))
    best = torch.minimum(*errors)
    for rule in (recipe.weight_scale_rule, recipe.activation_scale_rule):
        own = formats.dequantize(*formats.quantize(x, "nvfp4", rule, g), "nvfp4", g).double().view(-1, 16)
        assert torch.allclose((own - groups).square().sum(-1), best, rtol=1e-6)
    assert (errors[1] < errors[0]).any() and (errors[0] < errors[1]).any()


# -- MR-GPTQ and the list ------------------------------------------------------------------------------------------


def test_wush_as_published_is_the_papers_configuration():
    for format in ("mxfp4", "nvfp4"):
        assert METHODS["gptq-wush"].configuration(format) == wc.WushConfig.paper(format)


def test_mr_gptq_has_hadamard_blocks_of_the_group():
    for format, group in (("mxfp4", 32), ("nvfp4", 16)):
        model = quantize_by("gptq-hadamard", model_of("llama"), [tokens(8, 32)], format, progress=False)
        transform = model.model.layers[0].self_attn.q_proj.owner.input_transform
        assert torch.allclose(transform, walsh(group).float()[None], atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_quantizes(name):
    method, model, ids = METHODS[name], model_of("qwen3"), tokens(8, 32)
    reference = logits(model, ids)
    quantized = quantize_by(name, model, [ids], method.formats[0], progress=False)
    error = (logits(quantized, ids) - reference).square().mean() / reference.square().mean()
    assert 0 < error < 0.5
    groups = 14 if method.settings.get("share_transform") is False else 8
    assert len(list(wc.modules.named_groups(quantized))) == groups


def test_unknown_methods_and_formats_are_named():
    with pytest.raises(ConfigError, match="did you mean 'quarot'"):
        quantize_by("quarto", model_of("llama"), [tokens(1, 8)], "mxfp4")
    with pytest.raises(ConfigError, match="format of four-over-six 'mxfp4'"):
        quantize_by("four-over-six", model_of("llama"), [tokens(1, 8)], "mxfp4")
