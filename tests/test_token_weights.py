"""Token weights and sensitivities from gradients: against float64 autograd, by micro-batch, in the journal, without."""

import copy

import pytest
import torch
import transformers
from helpers import measured, same_tensors
from models import plain, tokens
from torch import nn

import wush_compile as wc
from wush_compile.calibration import loop
from wush_compile.calibration import token_weights as weighing
from wush_compile.calibration.likelihood import UNIT_STRIDE, sampled_gradient
from wush_compile.errors import ConfigError
from wush_compile.ops import core as ops
from wush_compile.solver import sensitivity

BATCHES = [tokens(3, 24, seed=1), tokens(1, 24, seed=2), tokens(2, 24, seed=3)]
GROUPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)


@pytest.fixture
def found(monkeypatch):
    """The weights that runs use: {group name: fp32 [rows]}."""
    runs, real = [], loop.token_weights

    def watched(variants, groups, *others):
        weights = real(variants, groups, *others)
        runs.append({groups[i].name: torch.cat(units) for i, units in weights.of_group.items()})
        return weights

    monkeypatch.setattr(loop, "token_weights", watched)
    return runs


def quantize(model, data=BATCHES, **settings):
    return wc.quantize(model, data, progress=False, **{"token_weights": "gradient", **settings})


def reference(model: nn.Module, batches: list[torch.Tensor], members: list[str]) -> torch.Tensor:
    """The weights of a group by autograd of the whole model in float64: one backward pass a batch."""
    model, outputs, norms, sequence = copy.deepcopy(model).double(), {}, [], 0
    for name in members:

        def keep(module, args, output, name=name):
            outputs[name] = output
            output.retain_grad()

        model.get_submodule(name).register_forward_hook(keep)
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits
        position = (sequence + torch.arange(len(ids)))[:, None] * UNIT_STRIDE + torch.arange(ids.shape[1])
        draw = ops._uniform(position.flatten(), 0).view(ids.shape)
        sampled = (logits.detach().softmax(-1).cumsum(-1) < draw[..., None]).sum(-1)
        logits.log_softmax(-1).gather(-1, sampled[..., None]).sum().backward()
        norms.append(sum(outputs[name].grad.square().sum(-1) for name in members).sqrt().flatten())
        sequence += len(ids)
    return _weights(torch.cat(norms))


def _weights(norm: torch.Tensor) -> torch.Tensor:
    weight = norm**weighing.POWER
    return (weight / weight.mean()).clamp(max=weighing.LARGEST_WEIGHT)


def test_weights_are_the_norms_of_the_gradients(found):
    model = plain("llama", torch.float32)
    expected = {
        f"model.layers.{layer}.{group[0]}": reference(model, BATCHES, [f"model.layers.{layer}.{g}" for g in group])
        for layer in (0, 1)
        for group in GROUPS
    }
    quantize(model)
    for name, weights in expected.items():
        torch.testing.assert_close(found[0][name].double(), weights, rtol=1e-4, atol=1e-5)
        assert weights.max() > 1.2
    assert {entry["token_weights"] for entry in measured(model).values()} == {"gradient"}
    other = quantize(plain("llama", torch.float32), batch_size=1)
    for name in found[0]:  # whatever the micro-batch, the same sampled tokens
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-5)
    assert same_tensors(quantize(plain("llama", torch.float32)), model)
    assert not same_tensors(other, quantize(plain("llama", torch.float32), token_weights="uniform"))


@pytest.fixture
def sensitivities(monkeypatch):
    """{group name: sensitivity} of each run."""
    runs, real = [], loop.token_weights

    def watched(variants, groups, *others):
        found = real(variants, groups, *others)
        runs.append({groups[i].name: value for i, value in found.sensitivity.items()})
        return found

    monkeypatch.setattr(loop, "token_weights", watched)
    return runs


def test_sensitivities_are_those_of_autograd(sensitivities, monkeypatch):
    """Σ ‖x‖² γ γᵀ by block, γ = Σ over members of g W, and the rows of largest ‖x‖ ‖γ‖, in float64."""
    monkeypatch.setattr(sensitivity, "ROWS", 5)
    wide, seen = plain("llama", torch.float32).double(), {}
    quantize(plain("llama", torch.float32), batch_size=2)
    members = ["model.layers.1.self_attn." + name for name in ("q_proj", "k_proj", "v_proj")]
    for name in members:

        def keep(module, args, output, name=name):
            seen[name] = args[0], output
            output.retain_grad()

        wide.get_submodule(name).register_forward_hook(keep)
    x, gamma, sequence = [], [], 0
    for ids in BATCHES:
        logits = wide(input_ids=ids, use_cache=False).logits
        position = (sequence + torch.arange(len(ids)))[:, None] * UNIT_STRIDE + torch.arange(ids.shape[1])
        draw = ops._uniform(position.flatten(), 0).view(ids.shape)
        sampled = (logits.detach().softmax(-1).cumsum(-1) < draw[..., None]).sum(-1)
        logits.log_softmax(-1).gather(-1, sampled[..., None]).sum().backward()
        x.append(seen[members[0]][0].flatten(0, 1).detach())
        weights = [(seen[name][1].grad.flatten(0, 1), wide.get_submodule(name).weight.detach()) for name in members]
        gamma.append(sum(g @ w for g, w in weights))
        sequence += len(ids)
    x, gamma = torch.cat(x), torch.cat(gamma)
    size = x.norm(dim=1) * gamma.norm(dim=1)
    blocks = (gamma * x.norm(dim=1, keepdim=True)).unflatten(-1, (-1, 32)).transpose(0, 1)
    found = sensitivities[0][members[0]]
    assert found.tokens == len(x) == 144
    expected = blocks.mT @ blocks
    torch.testing.assert_close(found.moment, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    for kept, rows in ((found.x, x), (found.gradient, gamma)):
        expected = rows[size.topk(5).indices].sort(0).values
        torch.testing.assert_close(
            kept.double().sort(0).values, expected, rtol=1e-3, atol=1e-4 * float(rows.abs().max())
        )


def test_masked_tokens_have_no_part(found, sensitivities):
    """Another id under the mask changes no weight, and the mean of 1 is that of the other rows."""
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, 5:9] = 0  # inside the row, so that it is not cut off
    ids = tokens(2, 24, seed=4)
    for value in (3, 7):
        quantize(
            plain("llama", torch.float32), [{"input_ids": ids.masked_fill(mask == 0, value), "attention_mask": mask}]
        )
    for name, weights in found[0].items():
        assert torch.equal(weights, found[1][name])
        assert (weights[mask.flatten() == 0] == 0).all()
        assert weights.sum() == pytest.approx(44, rel=1e-4)
    for one, two in zip(sensitivities[0].values(), sensitivities[1].values(), strict=True):
        assert one.tokens == two.tokens == 44
        assert all(torch.equal(getattr(one, key), getattr(two, key)) for key in ("moment", "x", "gradient"))


def test_observe_weighs_rows():
    x, weight = torch.randn(5, 7, 64), torch.rand(35) * 3
    mask = torch.arange(35).view(5, 7) % 3
    moment, count, sample = torch.zeros(64, 64), torch.zeros((), dtype=torch.int64), torch.zeros(0, 64)
    torch.ops.wush.observe(x, mask, moment, count, sample, 0, weight)
    rows, kept = x.view(35, 64).double(), mask.flatten() != 0
    torch.testing.assert_close(moment.double(), (rows * (weight * kept)[:, None]).T @ rows, rtol=1e-5, atol=1e-5)
    assert count == kept.sum()
    torch.library.opcheck(torch.ops.wush.observe.default, (x, mask, moment, count, sample, 0, weight))


def test_a_journal_keeps_the_weights(found, tmp_path, monkeypatch):
    model = plain("llama", torch.float32)
    with monkeypatch.context() as patch:
        solve = loop.solve_group

        def stopped(group, *args):
            if "layers.1" in group.name:
                raise KeyboardInterrupt
            return solve(group, *args)

        patch.setattr(loop, "solve_group", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(weighing, "measure", None)  # not called again
        quantize(model, out=tmp_path)
    assert all(torch.equal(weights, found[1][name]) for name, weights in found[0].items()) and found[0]
    assert same_tensors(model, quantize(plain("llama", torch.float32)))
    with pytest.raises(ConfigError, match="token_weights"):
        quantize(plain("llama", torch.float32), out=tmp_path, token_weights="uniform")


class Bare(nn.Module):
    """A model of rows, whose one result has no name; `rounds` lets no gradient through."""

    def __init__(self, rounds: bool = False):
        super().__init__()
        self.first, self.second, self.rounds = nn.Linear(64, 64), nn.Linear(64, 32), rounds

    def forward(self, x):
        y = self.second(self.first(x).relu())
        return y.round() if self.rounds else y


def bare(rounds: bool = False) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    return Bare(rounds), list(torch.randn(3, 40, 64))


def test_results_without_logits_are_means_of_normal_distributions(found):
    """The gradient of a sample is the sample minus its mean: standard normal numbers, the same ones every time."""
    model, x = bare()
    second = model.second.weight.detach().double()
    relu = torch.cat(x).double() @ model.first.weight.detach().double().T + model.first.bias.double() > 0
    quantize(model, x)
    drawn = [sampled_gradient(torch.zeros(40, 32), "normal", None, unit, 0) for unit in (0, 1, 2)]
    noise = torch.cat(drawn).double()
    assert noise.mean().abs() < 0.05 and noise.std() == pytest.approx(1, abs=0.05) and not drawn[0].equal(drawn[1])
    for name, gradient in (("second", noise), ("first", (noise @ second) * relu)):
        norm = gradient.norm(dim=1)
        torch.testing.assert_close(found[0][name].double(), _weights(norm), rtol=1e-4, atol=1e-5)


def test_results_that_are_added_to_in_place(found):
    """As Falcon's residual is."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            y = self.first(x)
            y += x
            return self.last(y)

    torch.manual_seed(0)
    quantize(InPlace().eval(), [torch.randn(4, 16, 64)])
    assert set(found[-1]) == {"first", "last"}


def test_without_gradients_tokens_count_alike(caplog):
    model, x = bare(rounds=True)
    other = copy.deepcopy(model)
    quantize(model, x)
    assert [r for r in caplog.records if "count alike" in r.message and "no gradient" in r.message]
    assert {entry["token_weights"] for entry in measured(model).values()} == {"uniform"}
    assert same_tensors(model, quantize(other, x, token_weights="uniform"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_every_run_on_a_gpu_has_the_same_weights(found, padded):
    """The gradients of flash attention and of cuDNN differ from run to run."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=256,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    ids = tokens(2, 1024, seed=1).cuda()
    mask = torch.ones_like(ids)
    mask[1, 900:] = 0
    data = [{"input_ids": ids, "attention_mask": mask}] if padded else [ids]
    runs = [quantize(copy.deepcopy(model), data) for _ in range(3)]
    assert all(same_tensors(run, runs[0]) for run in runs)
    assert all(torch.equal(weights, found[0][name]) for other in found for name, weights in other.items())
