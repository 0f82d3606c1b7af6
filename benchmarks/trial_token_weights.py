"""Trial: what a second moment weighs (docs/spec.md §3), what stands for S_b, scales by GPTQ's loss, the power of s,
sweeps, and calibration text of the model's own, alone and together.

    python benchmarks/trial_token_weights.py --data FOLDER --out trial.json --formats mxfp4 --activations same fp8
    python benchmarks/trial_token_weights.py --data FOLDER --out trial.json --rows uniform gradient gradient-loss
    python benchmarks/trial_token_weights.py --rows before sweeps sensitivity default --activations same

The model, the calibration and the test are those of `accuracy.py`: SmolLM2-135M-Instruct, 128 windows of 512 tokens of
WikiText-2 valid, 64 windows of 2048 of test. Without `--data` they are those of `make demo`, for a CPU: four minutes a
row. Each row quantizes the model anew; KL is to the model in bf16. `--out` is written after each row. A format and an
activation format take their own process well: several share a GPU.
"""

import copy
import itertools
import time
from typing import NamedTuple

import common
import torch

import wush_compile as wc
from wush_compile.calibration import token_weights
from wush_compile.data import sample_calibration_text
from wush_compile.evaluation.language import compare
from wush_compile.ops import core as ops
from wush_compile.solver import choose, sensitivity

ACTIVATIONS = {"same": "same", "fp8": "fp8", "none": None}
POWER, FEEDBACK_POWER, SCALED = dict(choose.POWER), dict(choose.FEEDBACK_POWER), ops.scaled_rows
USES, FACTORS = choose.uses_sensitivity, sensitivity.FACTORS


class Row(NamedTuple):
    """One setting: `power` is added to the library's power of s, `exponent` is that of gradients' norms.

    sensitivity   whether gradients stand for S_b; factors: among how many factors of T they choose
    text          windows of the model's own, in place of WikiText-2
    correction    how far weights make up for the groups in front
    """

    weights: str
    rule: str = "mse"
    power: float = 0.0
    bound: float | None = None
    exponent: float = 1.0
    sweeps: int = 0
    sensitivity: bool = False
    factors: int = FACTORS
    text: int = 0
    rounding: str = "nearest"
    correction: float = 0.0
    changes: dict = {}


DEFAULT = Row("gradient", "best", exponent=1.5, sweeps=2, sensitivity=True, rounding="feedback", correction=0.25)


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
    "before": Row("gradient", "best", exponent=1.5),
    "sweeps": DEFAULT._replace(sensitivity=False, correction=0.0),
    "sensitivity": DEFAULT._replace(sweeps=0, correction=0.0),
    "nearest": DEFAULT._replace(rounding="nearest", correction=0.0),
    "default": DEFAULT,
    "default-not-corrected": DEFAULT._replace(correction=0.0),
    "correction-1/8": DEFAULT._replace(correction=0.125),
    "correction-1/2": DEFAULT._replace(correction=0.5),
    "default-one-factor": DEFAULT._replace(factors=1),
    "sweeps-4": DEFAULT._replace(sweeps=4),
    "default-3/16": DEFAULT._replace(power=-0.1875),
    "default-1/8": DEFAULT._replace(power=-0.125),
    "default-1/16": DEFAULT._replace(power=-0.0625),
    "default+1/16": DEFAULT._replace(power=0.0625),
    "default+1/8": DEFAULT._replace(power=0.125),
    "default-loss": DEFAULT._replace(rule="loss"),
    "default-damping-.03": DEFAULT._replace(changes={"damping": 0.03}),
    "default-own": DEFAULT._replace(changes={"share_transform": False}),
    "search": DEFAULT._replace(changes={"activation_scale_rule": "search"}),
    "search-own": DEFAULT._replace(changes={"activation_scale_rule": "search", "share_transform": False}),
    "own-text-64": DEFAULT._replace(text=64),
    "own-text-128": DEFAULT._replace(text=128),
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


def quantize(model, data, format: str, activations: str, name: str):
    """A quantized copy, by one setting."""
    row, activation = ROWS[name], ACTIVATIONS[activations]
    choose.POWER[activation] = POWER[activation] + row.power
    choose.FEEDBACK_POWER.update({format: power + row.power for format, power in FEEDBACK_POWER.items()})
    choose.uses_sensitivity = USES if row.sensitivity else lambda recipe: False
    sensitivity.FACTORS = row.factors
    token_weights.POWER = row.exponent
    ops.scaled_rows = SCALED if row.bound is None else bound(row.bound)
    return wc.quantize(
        copy.deepcopy(model),
        data,
        format=format,
        activation_format=activation,
        token_weights=row.weights,
        weight_scale_rule=row.rule,
        sweeps=row.sweeps,
        activation_rounding=row.rounding,
        correction=row.correction,
        progress=False,
        **row.changes,
    )


def measure(model, data, ids, window: int, format: str, activations: str, name: str) -> dict:
    """KL, perplexity and top-1 agreement of one setting."""
    start = time.perf_counter()
    quantized = quantize(model, data, format, activations, name)
    middle = time.perf_counter()
    measured = compare(model, quantized, ids, window, progress=False)
    return {
        "format": format,
        "activations": activations,
        "row": name,
        "power": choose.power_of_s(quantized.wush_quantization.config.recipe),
        "perplexity": round(measured.perplexity, 3),
        "kl": round(measured.kl, 4),
        "top1": round(measured.top1, 4),
        "quantize_seconds": round(middle - start, 1),
        "phases": quantized.wush_quantization.run["seconds"],
        "peak_memory": quantized.wush_quantization.run["peak_memory"],
        "evaluate_seconds": round(time.perf_counter() - middle, 1),
    }


def main() -> None:
    parser = common.trial_parser(__doc__, __file__)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int, default=64, help="windows of 2048 tokens")
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    data, ids, window = common.smollm2_texts(args.data, tokenizer, device, args.calibration_windows, args.test_windows)
    texts = {0: data}
    result = {**common.environment(device), "rows": []}
    for name, format, activations in itertools.product(args.rows, args.formats, args.activations):
        own = ROWS[name].text
        if own and own not in texts:
            texts[own] = torch.cat(sample_calibration_text(model, tokenizer, own, progress=False)).to(device).split(8)
        result["rows"].append(measure(model, list(texts[own]), ids, window, format, activations, name))
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
