"""Code that asks a tensor for its values: a graph of its own for each grid, or an assertion in the graph."""

import pytest
import torch
from helpers import quantize
from torch import nn

from wush_compile.calibration import variants
from wush_compile.capture.export import capture
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


def test_a_question_about_the_data_is_an_assertion():
    above, below = torch.full((2, 8, 64), 0.5), torch.full((2, 8, 64), -0.5)
    model = quantize(Asks(), above, above * 2)
    assert isinstance(model.linear, WushLinear)
    assert quantization_of(model).run["verified"] == "equal"
    with pytest.raises(DataError, match="batch 1.* makes Asks run other code than the traced batch: .*alike"):
        quantize(Asks(), above, below, solver="gptq", transform="hadamard")
