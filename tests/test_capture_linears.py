"""Linears: subclasses whose trace is the product alone, parametrized ones, and true reasons for others."""

import pytest
import torch
from helpers import quantize
from torch import nn
from torch.nn.utils import parametrizations
from transformers import FalconConfig, FalconForCausalLM

from wush_compile.capture.export import capture
from wush_compile.checkpoint.record import quantization_of
from wush_compile.config import WushConfig
from wush_compile.modules import WushLinear
from wush_compile.passes.calibration.group import find_groups

ROWS = torch.randn(4, 8, 64, generator=torch.Generator().manual_seed(0))


class ByHand(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


class Named(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Two(nn.Module):
    def __init__(self, f: nn.Module):
        super().__init__()
        self.f, self.g = f, nn.Linear(64, 32)

    def forward(self, x):
        return self.g(self.f(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [ByHand, Named])
def test_a_subclass_that_is_the_product_is_a_linear(kind, bias):
    torch.manual_seed(0)
    plain, other = Two(nn.Linear(64, 64, bias)).eval(), Two(kind(64, 64, bias)).eval()
    other.load_state_dict(plain.state_dict())
    quantize(plain, ROWS)
    quantize(other, ROWS)
    assert isinstance(other.f, WushLinear)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_subclass_that_does_more_is_left_alone():
    model = quantize(Two(Halved(64, 64)).eval(), ROWS)
    assert type(model.f) is Halved
    assert quantization_of(model).ignored == {"f": "Halved has a forward of its own"}


@torch.no_grad()
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_linears(kind):
    torch.manual_seed(0)
    model = Two(kind(nn.Linear(64, 64))).eval()
    plain = Two(nn.Linear(64, 64)).eval()
    plain.f.weight.copy_(model.f.weight)
    plain.f.bias.copy_(model.f.bias)
    plain.g.load_state_dict(model.g.state_dict())
    quantize(model, ROWS)
    quantize(plain, ROWS)
    assert isinstance(model.f, WushLinear) and not quantization_of(model).ignored
    assert torch.equal(model(ROWS), plain(ROWS))


def test_a_weight_that_a_hook_computes_has_a_true_reason():
    with pytest.warns(FutureWarning):
        model = Two(nn.utils.weight_norm(nn.Linear(64, 64))).eval()
    quantize(model, ROWS)
    assert quantization_of(model).ignored == {"f": "its weight is computed in its forward or by a hook"}


def test_falcon():
    config = FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = FalconForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(3, 64, (1, 16))}
    groups, skipped = find_groups(capture(model, [ids]).graph_module, model, WushConfig())
    assert sum(len(group.linears) for group in groups) == 8
    assert list(skipped) == ["lm_head"]
