"""Sizes of inputs: the batch dimension is found, and a batch that the model's graph is not valid for gets its own."""

import pytest
import torch
from helpers import quantize
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

import wush_compile as wc
from wush_compile.calibration import variants
from wush_compile.capture.export import capture
from wush_compile.checkpoint.record import quantization_of
from wush_compile.errors import DataError
from wush_compile.modules import WushLinear


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens_of(model: nn.Module) -> list[int]:
    return [report["tokens"] for report in quantization_of(model).report.values()]


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.f = nn.Embedding(10, 64), nn.Linear(128, 64)

    def forward(self, x, label):
        return self.f(torch.cat([x, self.e(label)], -1))


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x, bias):
        return self.f(x + bias)


class Stack(nn.Module):
    """Loops over its batch: another size is another graph."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x):
        return self.f(torch.stack(list(x)))


LABEL = torch.tensor([3])


@pytest.mark.parametrize(
    "model, batches",
    [
        (Conditioned, [(rows(1, 64), LABEL)] * 2),
        (Conditioned, [(rows(4, 64), LABEL.repeat(4)), (rows(1, 64), LABEL)]),
        (Biased, [(rows(1, 8, 64), rows(64)), (rows(4, 8, 64), rows(64))]),
        (Biased, [(rows(4, 8, 64), rows(1, 64)), (rows(1, 4, 64), rows(1, 64))]),
        (Biased, [(rows(1, 8, 64), rows(1, 1, 64))] * 2),
    ],
)
@torch.no_grad()
def test_inputs_of_one_row_beside_others(model, batches):
    torch.manual_seed(0)
    model = model().eval()
    expected = [model(*batch) for batch in batches]
    captured = capture(model, batches)
    for batch, want in zip(batches, expected, strict=True):
        assert captured.refusal(batch) is None
        assert torch.equal(captured.graph_module(*batch), want)


def test_position_ids_of_one_row():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.randint(3, 64, (4, 16))
    model = quantize(LlamaForCausalLM(config), {"input_ids": ids, "position_ids": torch.arange(16)[None]})
    assert set(tokens_of(model)) == {64}


@pytest.mark.parametrize("sizes", [(1, 1), (4, 3), (2, 1, 4, 3, 4)])
@torch.no_grad()
def test_batches_that_a_guard_rejects_have_their_own_graphs(sizes):
    model = quantize(Stack().eval(), *[rows(size, 8, 64) for size in sizes])
    assert tokens_of(model) == [8 * sum(sizes)]
    assert isinstance(model.f, WushLinear)


@torch.no_grad()
def test_moments_of_all_graphs_add_up():
    """The same rows through one graph and through three give the same weights.

    Tokens count alike: a token's weight rests on a number drawn for its place in its batch, which differs here."""
    torch.manual_seed(0)
    first = Stack().eval()
    second = Stack().eval()
    second.load_state_dict(first.state_dict())
    data = [rows(4, 8, 64), rows(3, 8, 64), rows(2, 8, 64)]
    quantize(first, *data, token_weights="uniform")
    quantize(second, *[row[None] for batch in data for row in batch], token_weights="uniform")
    assert torch.allclose(first.f.dequantize(), second.f.dequantize(), atol=1e-4)


def test_mamba_with_chunks_and_without():
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    )
    model = Mamba2ForCausalLM(config).eval()
    model = quantize(model, *[torch.randint(3, 64, (1, n)) for n in (20, 5)])
    assert set(tokens_of(model)) == {25}


def test_too_many_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(variants, "MAX_GRAPHS", 2)
    model = Stack().eval()
    with pytest.raises(DataError, match="batch 2 needs graph number 3.*give batches of one size"):
        quantize(model, *[rows(n, 8, 64) for n in (4, 3, 2)])
    assert isinstance(model.f, nn.Linear)


class Short(nn.Module):
    """Cannot be traced with fewer than four rows."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(64, 64)

    def forward(self, x):
        if x.shape[0] < 4 and torch.compiler.is_compiling():
            raise ValueError("no tracing")
        return self.f(x)


def test_a_batch_that_cannot_be_traced_is_named():
    with pytest.raises(wc.WushError, match="batch 1 needs a graph of its own.*x.*Give batches of one size"):
        quantize(Short().eval(), rows(4, 64), rows(2, 64))


class Numbers(nn.Module):
    """Code that takes no symbol for a size."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        if type(x.shape[1]) is not int:
            raise TypeError("a number is wanted")
        return self.linear(x) / x.shape[1]


def test_code_that_takes_no_symbols_gets_a_graph_for_each_size():
    captured = capture(Numbers(), [(rows(2, 8, 64),)])
    assert captured.refusal((rows(2, 8, 64),)) is None
    assert captured.refusal((rows(3, 8, 64),)) == "x of the size [2, 8, 64]"
    model = quantize(Numbers(), (rows(2, 8, 64),), (rows(3, 9, 64),))
    assert isinstance(model.linear, WushLinear)
    assert quantization_of(model).run["verified"] == "equal"
