"""Code that asks a tensor for its values: a graph of its own for each grid, or an assertion in the graph."""

import pytest
import torch
from helpers import quantize
from torch import nn
from torch.func import functional_call

from wush_compile.calibration import variants
from wush_compile.capture.export import capture
from wush_compile.capture.meta import meta_copy
from wush_compile.checkpoint.record import quantization_of
from wush_compile.errors import DataError
from wush_compile.modules import WushLinear


class Vision(nn.Module):
    """An encoder that splits its patches by the grid of each image, as those of Qwen-VL do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, hidden_states, grid_thw):
        lengths = torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])
        parts = torch.split(self.linear(hidden_states), lengths.tolist())
        return self.out(torch.cat([part - part.mean(0) for part in parts]))


def images(*grid: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    patches = sum(t * h * w for t, h, w in grid)
    generator = torch.Generator().manual_seed(patches)
    return {"hidden_states": torch.randn(patches, 64, generator=generator), "grid_thw": torch.tensor(grid)}


def test_images_are_quantized_with_a_graph_for_each_grid(monkeypatch):
    made = []
    monkeypatch.setattr(variants, "capture", lambda model, batches: made.append(batches[0]) or capture(model, batches))
    batches = [images((1, 4, 4), (1, 2, 4)), images((1, 4, 4), (1, 2, 4)), images((1, 2, 2), (1, 2, 2))]
    model = quantize(Vision(), *batches, transform="hadamard", solver="gptq")
    assert isinstance(model.linear, WushLinear) and isinstance(model.out, WushLinear)
    assert quantization_of(model).run["verified"] == "equal"
    assert [batch["grid_thw"].tolist() for batch in made] == [[[1, 2, 2], [1, 2, 2]]]


def test_a_graph_of_one_grid_names_it():
    captured = capture(Vision(), [images((1, 4, 4), (1, 2, 4))])
    assert captured.refusal(images((1, 4, 4), (1, 2, 4))) is None
    assert captured.refusal(images((1, 2, 4), (1, 4, 4))) == "grid_thw of the values [1, 4, 4, 1, 2, 4]"


class Asks(nn.Module):
    """Runs other code where a row is negative, as models do that look for padding."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        y = self.linear(x)
        return y if (x[:, 0, 0] > 0).any() else -y


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.export keeps no assertion for such a question")
def test_a_question_about_the_data_is_an_assertion():
    above, below = torch.full((2, 8, 64), 0.5), torch.full((2, 8, 64), -0.5)
    model = quantize(Asks(), above, above * 2)
    assert isinstance(model.linear, WushLinear)
    assert quantization_of(model).run["verified"] == "equal"
    with pytest.raises(DataError, match="batch 1.* makes Asks run other code than the traced batch: .*alike"):
        quantize(Asks(), above, below, solver="gptq", transform="hadamard")


class Numbers(nn.Module):
    """Makes tensors from numbers beside its input, as models do for masks and scales."""

    def forward(self, x):
        scale = torch.tensor([[1.0, -2.5], [0.5, 4.0]], device=x.device)
        x = x @ scale.to(x.dtype) + x.new_tensor([0.25, 3])
        kept = torch.as_tensor([True, False], device=x.device)
        return torch.where(kept, x, torch.tensor(7.0, device=x.device, dtype=x.dtype))


def test_numbers_on_meta_keep_their_values():
    """A streamed model is traced on the meta device, where a constant of the graph would have no values."""
    model = nn.Sequential(Numbers(), nn.Linear(2, 2))
    captured = capture(meta_copy(model), [(torch.empty(3, 2, device="meta"),)])
    graph = captured.graph_module.graph
    assert {node.target for node in graph.nodes if node.op == "get_attr"} == {"1.weight", "1.bias"}
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    captured.graph_module.recompile()
    x = torch.randn(3, 2)
    with torch.no_grad():
        assert torch.equal(functional_call(captured.graph_module, dict(model.named_parameters()), (x,)), model(x))
