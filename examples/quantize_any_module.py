"""Any traceable module: quantize it on rows of its input, save it, and load it into an unquantized copy."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import wush_compile as wc


class Mixer(nn.Module):
    """Two branches of one input (they become one group), and a head."""

    def __init__(self, width: int = 256, hidden: int = 512, classes: int = 10):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.head(self.value(h) * self.gate(h).sigmoid())


def main() -> None:
    torch.manual_seed(0)
    model, test = Mixer(), torch.randn(512, 256)
    data = [torch.randn(256, 256) for _ in range(8)]
    with torch.no_grad():
        expected = model(test)
        for name, settings in {"RTN": dict(solver="rtn", transform="identity"), "GPTQ WUSH": {}}.items():
            torch.manual_seed(0)
            quantized = wc.quantize(Mixer(), data, format="nvfp4", ignore=("norm",), **settings)
            error = ((quantized(test) - expected).norm() / expected.norm()).item()
            print(f"{name}: relative error of the output {error:.4f}")

        out = Path(tempfile.mkdtemp()) / "checkpoint"
        wc.save(quantized, out)
        again = wc.load(out, model=Mixer())
        assert torch.equal(quantized(test), again(test))
    print(wc.explain(again))


if __name__ == "__main__":
    main()
