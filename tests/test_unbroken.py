"""quantize never returns a broken model: code around a linear works, or an error says why and nothing changes."""

import copy
import logging
import pickle

import pytest
import torch
from helpers import branches
from models import plain, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

import wush_compile as wc
from wush_compile.backend import preview
from wush_compile.calibration import verify
from wush_compile.modules import WushLinear, is_quantized

ROWS = [torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def quantize(model: nn.Module, data, **settings) -> nn.Module:
    return wc.quantize(model, data, progress=False, **{"solver": "rtn", **settings})


# -- `weight` and `bias` ---------------------------------------------------------------------------------------------


def test_weight_answers_and_is_read_only():
    model, x = branches()
    for linear in (model.q, model.k, model.out):
        weight, exact = linear.weight, linear.dequantize()
        assert isinstance(linear, nn.Linear) and isinstance(weight, Tensor)
        assert (weight.shape, weight.dtype, weight.device) == (exact.shape, torch.float32, exact.device)
        rows = torch.randn(3, linear.in_features)
        assert torch.equal(F.linear(rows, weight, linear.bias), F.linear(rows, exact, linear.bias))
        assert type(weight + 1) is Tensor and torch.equal(weight.T, exact.T)
        for write in (
            lambda w=weight: nn.init.zeros_(w),
            lambda w=weight: w.data.add_(1),
            lambda w=weight: setattr(w, "data", torch.zeros(1)),
            linear.reset_parameters,
        ):
            with pytest.raises(wc.WushError, match="read-only"):
                write()
    assert model.q.bias is None
    with pytest.raises(wc.WushError, match="read-only"):
        nn.init.zeros_(model.k.bias)
    assert torch.equal(model.k.bias, model.q.owner.bias[64:])
    assert [name for name, _ in model.named_parameters()] == ["norm.weight", "norm.bias"]
    assert not any(name.endswith("q.weight") for name in model.state_dict())


def test_weight_survives_copies_and_follows_casts():
    model, x = branches(torch.bfloat16)
    assert model.q.weight.dtype == torch.bfloat16
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.q.weight, model.q.weight)
    for again in (copy.deepcopy(model.q.weight), pickle.loads(pickle.dumps(model.q.weight))):
        assert type(again) is Tensor and torch.equal(again, model.q.weight)
    assert copy.deepcopy(model).float().q.weight.dtype == torch.float32
    assert copy.deepcopy(model).to("meta").q.weight.device.type == "meta"


def t5() -> nn.Module:
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)).eval()


@torch.no_grad()
def test_code_that_reads_the_dtype_costs_a_graph_nothing():
    """T5 asks for `wo.weight.dtype`: no dequantization is left in its graphs."""
    model, ids = quantize(t5(), [tokens(2, 9)]), tokens(2, 9)
    expected = model(ids).last_hidden_state
    program = torch.export.export(model, (), {"input_ids": ids})
    assert torch.equal(program.module()(input_ids=ids)[0], expected)
    for graph in (program.graph, preview(model, ids)["incoming"].graph):
        assert not any("shift" in str(n.target) for n in graph.nodes)  # the unpacking of codes


@torch.no_grad()
def test_transformer_encoder_calls_its_linears():
    """Its fast path multiplies with `weight` and would skip them, in eager mode and compiled."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True)
    model = quantize(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), ROWS)
    calls = []
    for module in model.modules():
        if isinstance(module, WushLinear):
            module.owner.register_forward_pre_hook(lambda *_: calls.append(1))
    model(ROWS[0])
    assert len(calls) == 4
    assert preview(model, ROWS[0]).snapshots[-1].counts["fp4_linear"] == 4


# -- broken models ---------------------------------------------------------------------------------------------------


class ReadsMore(nn.Module):
    """Calls `fc` in a trace; otherwise does `how` with it."""

    def __init__(self, how):
        super().__init__()
        self.first, self.fc, self.how = nn.Linear(64, 64), nn.Linear(64, 64), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.fc(h) if torch.compiler.is_exporting() else self.how(self.fc, h)


class Stack(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers = nn.ModuleList(ReadsMore(how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


HOWS = {
    "an attribute": (
        lambda fc, h: fc(h) * fc.my_scale,
        r"does not run with quantized linears: module 'layers\.0' \(ReadsMore\) .*AttributeError.*'my_scale'",
        ("layers.*.fc", "layers.*.first"),
    ),
    "the weight": (
        lambda fc, h: F.linear(h, fc.weight, fc.bias),
        r"layers\.0\.fc, in module 'layers\.0' \(ReadsMore\), is not called in the model; give ignore=",
        ("layers.*.fc",),
    ),
    "another result": (
        lambda fc, h: fc(h + 0.25 * isinstance(fc, WushLinear)),
        r"layers\.0\.fc, in module .*, returns something else in the model; give ignore=",
        ("layers.*.fc",),
    ),
}


def everything(model: nn.Module) -> list:
    """Every attribute of every module, its submodules and hooks included, by identity."""
    return [
        (name, type(m), {k: id(v) for k, v in vars(m).items()}, {k: id(v) for k, v in m._modules.items()})
        + tuple((k, id(v)) for hooks in (m._forward_hooks, m._forward_pre_hooks) for k, v in hooks.items())
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("out", [False, True], ids=["in memory", "with out="])
def test_a_model_that_would_break_is_refused_and_unchanged(tmp_path, how, out):
    function, message, patterns = HOWS[how]
    torch.manual_seed(0)
    model = Stack(function).eval()
    model.layers[1].train()
    for layer in model.layers:
        layer.fc.my_scale = 0.5
    model.layers[0].fc.register_forward_hook(lambda *_: None)
    directory = {"out": tmp_path / "out"} if out else {}
    before, expected = everything(model), model(ROWS[0])
    with pytest.raises(wc.WushError, match=message) as error:
        quantize(model, ROWS, **directory)
    assert everything(model) == before and torch.equal(model(ROWS[0]), expected)
    assert not is_quantized(model) and not hasattr(model, "wush_quantization")
    assert not (tmp_path / "out" / "config.json").exists()
    ignore = str(error.value).rpartition("ignore=(")[2].partition(")")[0]
    assert set(eval(f"({ignore})")) == set(patterns)
    if how == "an attribute":  # the whole module is named: leave out what does read
        ignore = "'layers.*.fc',"
    quantize(model, ROWS, ignore=eval(f"({ignore})"), restart=True, **directory)
    assert isinstance(model.layers[0].first, WushLinear) and type(model.layers[1].fc) is nn.Linear


def test_random_numbers_in_a_forward_are_no_difference():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.b(self.a(x) + torch.rand_like(x))

    state = torch.get_rng_state()
    model = quantize(Noisy().eval(), ROWS, transform="hadamard")
    assert is_quantized(model)
    torch.set_rng_state(state)


def test_a_model_that_differs_from_its_graph_without_quantization_has_a_bound():
    """A rounding difference before a quantizer flips codes: allowed. Anything larger is not."""

    class Other(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.a, self.b, self.error = nn.Linear(64, 64), nn.Linear(64, 64), error

        def forward(self, x):
            h = self.a(x)
            return self.b(
                h if torch.compiler.is_exporting() else h * (1 + 1e-6) + self.error * isinstance(self.a, WushLinear)
            )

    torch.manual_seed(0)
    assert is_quantized(quantize(Other(0.0).eval(), ROWS))
    with pytest.raises(wc.WushError, match="b returns something else"):
        quantize(Other(10.0).eval(), ROWS)


class Rare(nn.Module):
    """Between its linears it differs from its trace in one bit of some values, and only where `first` is quantized."""

    def __init__(self, error: float):
        super().__init__()
        self.first, self.last, self.error = nn.Linear(64, 64), nn.Linear(64, 64), error

    def forward(self, x):
        y = self.first(x)
        if not torch.compiler.is_exporting() and isinstance(self.first, WushLinear):
            y = torch.where(y > 0, y * (1 + self.error), y)
        return self.last(y)


def test_a_difference_in_rounding_that_shows_with_quantization_alone():
    """In bf16 another order of a sum seldom changes a value, so that the unquantized model may equal its graph."""
    torch.manual_seed(0)
    model, data = Rare(2**-7).bfloat16().eval(), [x.bfloat16() for x in ROWS]
    quantize(model, data)
    assert is_quantized(model) and model.wush_quantization.run["verified"] == verify.NOISE
    model = Rare(0.05).bfloat16().eval()
    with pytest.raises(wc.WushError, match="last returns something else"):
        quantize(model, data)


def test_one_short_row_runs(monkeypatch):
    seen = []
    compare = verify._compare
    monkeypatch.setattr(verify, "_compare", lambda check, *a: seen.append(check.batch) or compare(check, *a))
    quantize(plain("llama"), [tokens(4, 40)])
    (batch,) = seen
    assert batch["input_ids"].shape == (1, verify.POSITIONS)


def test_a_graph_that_refuses_the_short_row_gets_the_whole_batch(caplog):
    class Even(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(97, 64), nn.Linear(64, 64)

        def forward(self, input_ids):
            if input_ids.shape[1] < 20:
                raise ValueError("too short")
            return self.fc(self.embed(input_ids))

    with caplog.at_level(logging.WARNING, "wush_compile"):
        assert is_quantized(quantize(Even().eval(), [tokens(2, 24)]))
    assert "not checked" not in caplog.text
