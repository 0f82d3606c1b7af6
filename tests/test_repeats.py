"""Models that repeat a layer: the graph equals that of the whole trace, or the model is traced as a whole."""

import threading

import pytest
import torch
from models import plain, tokens
from torch import fx, nn
from transformers import GPT2Config, GPT2LMHeadModel

import wush_compile as wc
from wush_compile.capture import repeats
from wush_compile.capture.export import capture

BATCHES = [{"input_ids": tokens(2, 16)}, {"input_ids": tokens(1, 24)}]


def traced(model: nn.Module, batches: list, monkeypatch) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """The graph by layers, if there is one, and the whole one."""
    made, by_layers = [], repeats.export_by_layers
    with monkeypatch.context() as patch:
        patch.setattr(repeats, "export_by_layers", lambda *a: made.append(by_layers(*a)) or made[-1])
        graph_module = capture(model, batches).graph_module
        patch.setattr(repeats, "export_by_layers", lambda *a: None)
        whole = capture(model, batches).graph_module
    return None if made[0] is None else graph_module, whole


def lines(graph_module: fx.GraphModule) -> list[tuple]:
    """Op, operands by place, layer and shape of every node. An attribute is its name alone: its place means nothing."""
    places: dict[fx.Node, object] = {}
    found = []

    def place(value: object) -> object:
        if isinstance(value, fx.Node):
            return places[value]
        return tuple(map(place, value)) if isinstance(value, list | tuple) else str(value)

    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            places[node] = node.target
            continue
        places[node], value = len(found), node.meta.get("val")
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        shape = str(getattr(value, "shape", value))
        found.append((node.op, str(node.target), place(node.args), str(node.kwargs), stack, shape))
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_the_graph_is_the_same(kind, monkeypatch):
    """Gemma 3 has layers of two kinds: every sixth one has another mask and other frequencies."""
    model = plain(kind, torch.float32, layers=7)
    by_layers, whole = traced(model, BATCHES, monkeypatch)
    assert lines(by_layers) == lines(whole)
    for batch in BATCHES:
        with torch.no_grad():
            assert torch.equal(by_layers(**batch).logits, whole(**batch).logits)


def test_one_layer_of_each_kind_is_traced(monkeypatch):
    calls = []
    model = plain("llama", layers=6)
    for layer in model.model.layers:
        original = layer.self_attn.forward
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda *a, original=original, **k: calls.append(1) or original(*a, **k)
        )
    monkeypatch.setattr(
        repeats, "verify", lambda kinds, meta: dict.fromkeys([n for k in kinds for n in (k.name, *k.others)], 0)
    )
    capture(model, BATCHES)
    assert len(calls) == 1


class Layer(nn.Module):
    """What may differ between layers that look alike."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.seen = number, None
        self.linear = nn.Linear(32, 32)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return x + self.linear(x)


class Numbered(Layer):
    def forward(self, x):
        return x + self.linear(x) / (self.number + 1)


class Remembers(Layer):
    def forward(self, x):
        self.seen = self.number
        return x + self.linear(x)


class Appends(Layer):
    def forward(self, x, seen):
        seen.append(x)
        return x + self.linear(x)


class Writes(Layer):
    def forward(self, x):
        return x.add_(self.linear(x))


class Counts(Layer):
    def forward(self, x):
        self.steps.add_(1)
        return x + self.linear(x) * self.steps


class Wide(Layer):
    def __init__(self, number: int):
        super().__init__(number)
        self.linear = nn.Sequential(nn.Linear(32, 32 + 32 * number), nn.Linear(32 + 32 * number, 32))


class Net(nn.Module):
    def __init__(self, kind: type[Layer], count: int = 5):
        super().__init__()
        self.layers = nn.ModuleList(kind(i) for i in range(count))

    def forward(self, x):
        x, seen = x.clone(), []
        for layer in self.layers:
            before = x
            x = layer(x, seen) if isinstance(layer, Appends) else layer(x)
            x = x + before if isinstance(layer, Writes) else x
        return x + sum(seen)


def shares(net: Net) -> Net:
    net.layers[3].linear = net.layers[1].linear
    return net


def hooks(net: Net) -> Net:
    net.layers[3].linear.register_forward_hook(lambda module, args, out: 2 * out)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(Remembers),
        lambda: Net(Appends),
        lambda: Net(Writes),
        lambda: Net(Counts),
        lambda: Net(Wide),
        lambda: shares(Net(Layer)),
        lambda: hooks(Net(Layer)),
        lambda: Net(Layer, count=3),
    ],
    ids=["attribute", "argument", "in place", "buffer", "width", "shared", "hook", "few"],
)
def test_layers_that_differ_are_all_traced(make, monkeypatch):
    model, batches = make().eval(), [(torch.randn(4, 32),)]
    by_layers, whole = traced(model, batches, monkeypatch)
    assert by_layers is None
    # What a model does to itself is done to the graph's copy too: compare with a model in the state before.
    with torch.no_grad():
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        got = whole(*batches[0])
        model.load_state_dict(state)
        torch.testing.assert_close(got, model(*batches[0]))


class Other(Layer):
    """The same modules and tensors as a `Layer`, another forward."""

    def forward(self, x):
        return x - self.linear(x)


class Deep(Layer):
    def __init__(self, number: int):
        super().__init__(number)
        self.more = nn.Linear(32, 32)

    def forward(self, x):
        return self.more(self.linear(x))


class Sometimes(Layer):
    """Every third one does more: only running it tells."""

    def forward(self, x):
        return self.linear(x).relu() if self.number % 3 == 2 else self.linear(x)


class Mixed(Net):
    def __init__(self, *kinds: type[Layer]):
        super().__init__(Layer)
        self.layers = nn.ModuleList(kind(i) for i, kind in enumerate(kinds))


@pytest.mark.parametrize(
    "make, traced_layers",
    [
        (lambda: Mixed(Layer, Other, Layer, Other, Layer), 3),
        (lambda: Mixed(Layer, Layer, Deep, Layer, Layer, Deep), 3),
        (lambda: Mixed(Layer, Layer, Layer, Deep), 3),
        (lambda: Net(Sometimes, count=7), 3),
        (lambda: Net(Numbered), 5),
    ],
    ids=["class", "structure", "alone", "path", "number"],
)
def test_each_kind_of_a_hybrid_stack_is_traced_once(make, traced_layers, monkeypatch):
    model, kinds = make().eval(), []
    expand = repeats.expand_repeats
    monkeypatch.setattr(repeats, "expand_repeats", lambda graph, found: kinds.extend(found) or expand(graph, found))
    by_layers, whole = traced(model, [(torch.randn(4, 32),)], monkeypatch)
    assert lines(by_layers) == lines(whole)
    assert len(kinds) == traced_layers  # the first layer alone sees the width as a symbol


def test_layers_that_are_alike_are_not(monkeypatch):
    by_layers, whole = traced(Net(Layer).eval(), [(torch.randn(4, 32),)], monkeypatch)
    assert lines(by_layers) == lines(whole)


def test_a_scale_by_the_layers_number_is_seen(monkeypatch):
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_embd=64,
            n_layer=5,
            n_head=4,
            n_positions=64,
            scale_attn_by_inverse_layer_idx=True,
            bos_token_id=1,
            eos_token_id=None,
            attn_implementation="eager",
        )
    ).eval()
    by_layers, whole = traced(model, BATCHES, monkeypatch)
    assert lines(by_layers) == lines(whole)


def test_the_quantized_model_is_the_same(monkeypatch):
    """Bytes of every tensor, with one layer traced and with all."""
    states = []
    for by_layers in (repeats.export_by_layers, lambda *a: None):
        monkeypatch.setattr(repeats, "export_by_layers", by_layers)
        model = wc.quantize(plain("llama", layers=5), [b["input_ids"] for b in BATCHES], solver="rtn", progress=False)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), states[1][name].reshape(-1).view(torch.uint8)), name


def test_a_model_that_cannot_be_copied_is_traced_as_a_whole(monkeypatch):
    """The layers are compared on a copy of the model, which something in it may forbid."""
    model = Net(Layer).eval()
    model.lock = threading.Lock()
    by_layers, whole = traced(model, [(torch.randn(4, 32),)], monkeypatch)
    assert by_layers is None and whole is not None
