"""Trial: what a second moment weighs (docs/spec.md §3), scales by GPTQ's loss, and the power of s, alone and together.

    python benchmarks/trial_token_weights.py --data FOLDER --out trial.json --formats mxfp4 --activations same fp8
    python benchmarks/trial_token_weights.py --data FOLDER --out trial.json --rows uniform gradient gradient-loss

The model, the calibration and the test are those of `accuracy.py`: SmolLM2-135M-Instruct, 128 windows of 512 tokens of
WikiText-2 valid, 64 windows of 2048 of test. Each row quantizes the model anew; KL is to the model in bf16. `--out` is
written after each row. A format and an activation format take their own process well: several share a GPU.
"""

import argparse
import copy
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import common
import torch

import wush_compile as wc
from wush_compile.calibration import token_weights
from wush_compile.data import windows
from wush_compile.evaluation.language import compare
from wush_compile.ops import core as ops
from wush_compile.solver import choose

ACTIVATIONS = {"same": "same", "fp8": "fp8", "none": None}
POWER, SCALED = dict(choose.POWER), ops.scaled_rows


class Row(NamedTuple):
    """One setting: `power` is added to the library's power of s, `exponent` is that of gradients' norms."""

    weights: str
    rule: str = "mse"
    power: float = 0.0
    bound: float | None = None
    exponent: float = 1.0
    changes: dict = {}


ROWS = {
    "uniform": Row("uniform"),
    "gradient": Row("gradient"),
    "uniform-loss": Row("uniform", "loss"),
    "gradient-loss": Row("gradient", "loss"),
    "gradient-loss+1/8": Row("gradient", "loss", 0.125),
    "gradient-loss-1/8": Row("gradient", "loss", -0.125),
    "gradient-loss+1/16": Row("gradient", "loss", 0.0625),
    "uniform+1/8": Row("uniform", "mse", 0.125),
    "gradient+1/8": Row("gradient", "mse", 0.125),
    "gradient^1.5": Row("gradient", exponent=1.5),
    "gradient^2": Row("gradient", exponent=2.0),
    "gradient-loss^1.5": Row("gradient", "loss", exponent=1.5),
    "gradient-loss^2": Row("gradient", "loss", exponent=2.0),
    "gradient-loss^1.5+1/8": Row("gradient", "loss", 0.125, exponent=1.5),
    "gradient-loss^2+1/8": Row("gradient", "loss", 0.125, exponent=2.0),
    "gradient^1.5+1/8": Row("gradient", "mse", 0.125, exponent=1.5),
    "default": Row("gradient", "best", exponent=1.5),
    "gradient-bound-4": Row("gradient", bound=4.0),
    "gradient-bound-100": Row("gradient", bound=100.0),
    "hadamard": Row("uniform", changes={"transform": "hadamard"}),
    "gradient-loss-own": Row("gradient", "loss", changes={"share_transform": False}),
}


def bound(limit: float):
    """`scaled_rows` with weights times min(1, limit · median ‖x‖² / ‖x‖²), the median of the rows at hand."""

    def scaled(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        power = rows.float().square().sum(-1)
        return SCALED(rows, weight * (limit * power.median() / power.clamp(min=1e-30)).clamp(max=1))

    return scaled


def measure(model, data, ids, format: str, activations: str, name: str) -> dict:
    """KL, perplexity and top-1 agreement of one setting."""
    row, activation = ROWS[name], ACTIVATIONS[activations]
    choose.POWER[activation] = POWER[activation] + row.power
    token_weights.POWER = row.exponent
    ops.scaled_rows = SCALED if row.bound is None else bound(row.bound)
    start = time.perf_counter()
    quantized = wc.quantize(
        copy.deepcopy(model),
        data,
        format=format,
        activation_format=activation,
        token_weights=row.weights,
        weight_scale_rule=row.rule,
        progress=False,
        **row.changes,
    )
    middle = time.perf_counter()
    measured = compare(model, quantized, ids, 2048, progress=False)
    return {
        "format": format,
        "activations": activations,
        "row": name,
        "power": choose.POWER[activation],
        "perplexity": round(measured.perplexity, 3),
        "kl": round(measured.kl, 4),
        "top1": round(measured.top1, 4),
        "quantize_seconds": round(middle - start, 1),
        "phases": quantized.wush_quantization.run["seconds"],
        "peak_memory": quantized.wush_quantization.run["peak_memory"],
        "evaluate_seconds": round(time.perf_counter() - middle, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, default=Path("trial_token_weights.json"))
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int, default=64, help="windows of 2048 tokens")
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    valid, test = (common.wikitext(args.data, split) for split in ("valid", "test"))
    data = torch.cat(windows(valid, tokenizer, 512, args.calibration_windows)).to(device).split(8)
    ids = torch.cat(windows(test, tokenizer, 2048, args.test_windows), dim=1)
    result = {**common.environment(device), "rows": []}
    for name, format, activations in itertools.product(args.rows, args.formats, args.activations):
        result["rows"].append(measure(model, list(data), ids, format, activations, name))
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
