"""The paper's figures: one function a figure returns the data that it shows; `draw` makes an SVG of the data."""

import json
import math
from collections.abc import Callable

import figures
import tables
import task_table
import torch

from wush_compile import formats
from wush_compile.solver.transforms import hadamard_matrix, wush_transform

POINTS = 2000


def _gaussian(seed: int, ratio: float, angle: float) -> torch.Tensor:
    """Points [n, 2] of an anisotropic normal distribution, float64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(POINTS, 2, dtype=torch.float64, generator=generator) * torch.tensor([ratio, 1.0])
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    return z @ turn.mT


def figure1() -> dict:
    """How transforms reshape the error: two channels, a group of two, FP (e2m1 with a real scale) and INT (4 bits).

    Of each transform the loss of eq. 14 on a sample, relative to the output's power: weights are exact here.
    """
    x, w = _gaussian(0, 6.0, 0.5), _gaussian(1, 3.0, -0.9)
    root = torch.linalg.cholesky(x.mT @ x / len(x))[None]
    gram = (w.mT @ w / len(w))[None]
    kinds = {
        "I": torch.eye(2, dtype=torch.float64),
        "H": hadamard_matrix(2),
        "WUS": wush_transform(root, gram, 0.0, hadamard=False)[0],
        "WUSH": wush_transform(root, gram, 0.0)[0],
    }
    power = float((x @ w.mT).square().mean())
    note = (
        "a sketch from random points, as the paper's; no model. Of two channels the larger one is exact in both formats"
    )
    found = {"transforms": {}, "note": note}
    for kind, t in kinds.items():
        z, back = x @ t.mT, torch.linalg.inv(t)
        largest = z.abs().amax(1, keepdim=True)
        rounded = {
            "FP": formats.e2m1_round((z / largest * 6).float()).double() * largest / 6,
            "INT": (z / largest * 7).round() * largest / 7,
        }
        losses = {q: float(((v - z) @ back.mT @ w.mT).square().mean()) / power for q, v in rounded.items()}
        found["transforms"][kind] = {"losses": losses, "points": [[round(v, 3) for v in p] for p in z[:300].tolist()]}
    return found


def figure2() -> dict:
    """Speed of a layer over bf16, on our device."""
    return {**figures.plot_data(), "note": "the paper's are an RTX 5090's; the device is another: none stands beside"}


def figure4() -> dict:
    """Marginals of two channels before and after a Hadamard transform, with the eigenvalues that it keeps."""
    x = _gaussian(2, 5.0, 0.15)
    found = {"note": "a sketch from random points, as the paper's; no model"}
    for kind, t in {"original": torch.eye(2, dtype=torch.float64), "Hadamard": hadamard_matrix(2)}.items():
        z = x @ t.mT
        moment = z.mT @ z / len(z)
        found[kind] = {
            "points": [[round(v, 3) for v in p] for p in z[:400].tolist()],
            "deviations": moment.diagonal().sqrt().tolist(),
            "eigenvalues": torch.linalg.eigvalsh(moment).tolist(),
        }
    return found


def figure5() -> dict | None:
    """RMS of the channels of a layer's input and weight under each transform."""
    return tables.result("equalization_cpu")


def figure6() -> dict:
    """log2(1 + x) ≈ x, which the model of floating-point errors rests on."""
    x = [i / 100 for i in range(101)]
    exact = [math.log2(1 + v) for v in x]
    return {"x": x, "log2(1 + x)": exact, "largest difference": max(e - v for e, v in zip(exact, x))}


def task_bars() -> dict | None:
    """Recovery by method, of the files of task_table.py: Figures 3 and 7 to 10 where the tasks are PlatinumBench's."""
    found = {}
    for path in sorted(tables.RESULTS.glob("tasks_*.json")):
        measured = json.loads(path.read_text())
        lines = [line for line in task_table.rows(measured["runs"]) if line["format"] != "reference"]
        found[measured["model"]] = {f"{line['format']} {line['method']}": line["recovery"] for line in lines}
    return found or None


def _scatter(axes, data: dict, kinds: dict[str, dict]) -> None:
    for panel, (kind, one) in zip(axes, kinds.items()):
        panel.scatter(*zip(*one["points"]), s=2)
        panel.set_aspect("equal")
        label = one.get("losses") or {"eigenvalues": [round(v, 2) for v in one["eigenvalues"]]}
        text = "\n".join(f"{k}: {100 * v:.2f} %" if isinstance(v, float) else f"{k}: {v}" for k, v in label.items())
        panel.set_title(f"{kind}\n{text}", fontsize=8)


def draw(name: str, data: dict, path) -> None:
    """Draws a figure's data as SVG; the same data give the same bytes."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "wush"
    import matplotlib.pyplot as plt

    count = {"figure1": 4, "figure4": 2, "figure5": 2 * len(data.get("rms", ()))}.get(name, 1)
    chart, axes = plt.subplots(1, count, figsize=(3.2 * count if count > 1 else 6.4, 3.6), layout="constrained")
    if name == "figure1":
        _scatter(axes, data, data["transforms"])
    elif name == "figure4":
        _scatter(axes, data, {kind: data[kind] for kind in ("original", "Hadamard")})
    elif name == "figure2":
        for format in ("mxfp4", "nvfp4"):
            axes.plot(data["rows"], data[format], marker="o", label=format.upper())
        axes.set(xscale="log", xlabel="rows", ylabel="speed-up over bf16", title=data["device"])
        axes.legend()
    elif name == "figure5":
        sides = [(linear, side) for linear in data["rms"] for side in ("activation", "weight")]
        for panel, (linear, side) in zip(axes, sides):
            for kind, one in data["rms"][linear].items():
                panel.plot(sorted(one[side], reverse=True), label=kind, linewidth=1)
            panel.set(yscale="log", title=f"{linear}: {side}", xlabel="channels, by size", ylabel="RMS")
        axes[0].legend(fontsize=7)
    elif name == "figure6":
        axes.plot(data["x"], data["log2(1 + x)"], label="log2(1 + x)")
        axes.plot(data["x"], data["x"], label="x", linestyle="--")
        axes.legend()
    else:
        bars = {f"{model}\n{row}": v for model, one in data.items() for row, v in one.items()}
        axes.barh(list(bars), list(bars.values()))
        axes.set(xlabel="recovery, %")
        axes.tick_params(labelsize=6)
    chart.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(chart)


FIGURES: dict[str, tuple[str, Callable[[], dict | None]]] = {
    "figure1": ("Figure 1: how transforms reshape the error of two channels", figure1),
    "figure2": ("Figure 2: speed of a layer over bf16", figure2),
    "figure4": ("Figure 4: a rotation evens marginals, not eigenvalues", figure4),
    "figure5": ("Figure 5: RMS of channels", figure5),
    "figure6": ("Figure 6: log2(1 + x) and x", figure6),
    "figure3_7_10": ("Figures 3, 7 to 10: recovery on tasks", task_bars),
}
