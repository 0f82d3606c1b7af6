"""What 4 bits cost SmolLM2-135M-Instruct on WikiText-2: perplexity, KL to bf16 and top-1 agreement, one row a setting.

    python benchmarks/accuracy.py --data FOLDER --out accuracy.json
    python benchmarks/accuracy.py --data FOLDER --out accuracy.json --rows rtn-identity gptq-hadamard paper default
    python benchmarks/accuracy.py --list                                    the rows, and what each takes on an H200

FOLDER holds valid.txt and test.txt of WikiText-2 raw. Calibration uses the first windows of valid, evaluation the first
windows of test. The decoder's linears are quantized on both sides; embedding and head stay bf16.

`--out` is written after each row. The same command with the same file goes on after the last finished row. A row is
done again if its configuration has changed; all rows are done again if the model, the texts, the device or a version
has.
"""

import argparse
import copy
import gc
import json
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import common
import torch

import wush_compile as wc
from wush_compile.baselines.methods import METHODS, Method, prepare
from wush_compile.data import windows
from wush_compile.demo import smollm2
from wush_compile.evaluation.language import compare, perplexity
from wush_compile.formats import get_format

CALIBRATION_BATCH = 8
TEST_WINDOW = 2048


class Row(NamedTuple):
    """A configuration: settings of WushConfig beside the format (`configuration` adds what they cannot say)."""

    title: str
    seconds: int  # quantizing and evaluating on one H200, about
    settings: dict
    method: Method | None = None  # of `wush_compile.baselines`, which then has the settings


RTN, HADAMARD = {"solver": "rtn"}, {"transform": "hadamard"}
EQUAL = {"token_weights": "uniform", "sweeps": 0, "correction": 0.0, "activation_rounding": "nearest"}
ABSMAX = EQUAL | {"weight_scale_rule": "absmax", "activation_scale_rule": "absmax"}
MSE_WEIGHTS = EQUAL | {"weight_scale_rule": "mse", "activation_scale_rule": "absmax"}
MSE = EQUAL | {"weight_scale_rule": "mse"}
PAPER_RULES = EQUAL | {"weight_scale_rule": "paper", "activation_scale_rule": "paper"}
# In the order of the tables. Rows that name no rule use absmax on both sides; only the default weighs tokens,
# corrects weights and rounds activations with feedback.
ROWS = {
    "rtn-identity-paper": Row(
        "RTN, no transform, the authors' scale rule", 23, RTN | PAPER_RULES | {"transform": "identity"}
    ),
    "rtn-hadamard-paper": Row("RTN, Hadamard, the authors' scale rule", 23, RTN | PAPER_RULES | HADAMARD),
    "rtn-identity": Row("RTN, no transform", 22, RTN | ABSMAX | {"transform": "identity"}),
    "rtn-hadamard": Row("RTN, Hadamard", 23, RTN | ABSMAX | HADAMARD),
    "rtn-wus": Row("RTN, WUS", 22, RTN | ABSMAX | {"transform": "wus"}),
    "rtn-wush": Row("RTN, WUSH", 24, RTN | ABSMAX),
    "rtn-wush-conditional": Row("RTN, WUSH, conditional moments", 24, RTN | ABSMAX | {"moments": "conditional"}),
    "rtn-wush-mse-weights": Row("RTN, WUSH, least-squares weight scales", 24, RTN | MSE_WEIGHTS),
    "rtn-wush-mse": Row("RTN, WUSH, least-squares scales on both sides", 27, RTN | MSE),
    "gptq-identity": Row("GPTQ, no transform", 41, ABSMAX | {"transform": "identity"}),
    "gptq-hadamard": Row("GPTQ, Hadamard", 46, ABSMAX | HADAMARD),
    "gptq-hadamard-mse": Row("GPTQ, Hadamard, least-squares scales on both sides", 55, HADAMARD | MSE),
    "gptq-wush": Row("GPTQ, WUSH", 46, ABSMAX),
    "gptq-wush-mse-weights": Row("GPTQ, WUSH, least-squares weight scales", 50, MSE_WEIGHTS),
    "gptq-wush-mse": Row("GPTQ, WUSH, least-squares scales on both sides", 62, MSE),
    "gptq-wush-mse-conditional": Row("… with conditional moments", 62, MSE | {"moments": "conditional"}),
    "gptq-wush-mse-blocks": Row("… with transform blocks of two groups", 55, MSE),
    "gptq-wush-mse-not-shared": Row("… with a transform for each linear", 70, MSE | {"share_transform": False}),
    "paper": Row("`WushConfig.paper`: the authors' schedule and rules, a transform for each linear", 60, {}),
    "default": Row(
        "tokens weighed by gradients, weights corrected, activations rounded with feedback (the default)", 62, {}
    ),
    "default-not-corrected": Row("… with weights that are not corrected", 62, {"correction": 0.0}),
    "default-not-shared": Row("… with a transform for each linear", 70, {"share_transform": False}),
}


# Other methods in the same harness, with the best settings that are known of them.
METHOD_SECONDS = {"rtn": 25, "gptq": 45}
BASELINES = {name: m for name, m in METHODS.items() if name not in ("default", "gptq-wush")}
# How much SmoothQuant moves: its authors' default is .5, and .85 is what they take for Llama.
BASELINES["smoothquant-gptq-85"] = replace(METHODS["smoothquant-gptq"], title="… with α = .85", alpha=0.85)
ROWS |= {
    f"baseline-{name}": Row(m.title, METHOD_SECONDS[m.settings["solver"]], m.settings, m)
    for name, m in BASELINES.items()
}


def configuration(name: str, format: str) -> wc.WushConfig:
    if name == "paper":
        return wc.WushConfig.paper(format)
    if name == "gptq-wush-mse-blocks":
        return wc.WushConfig(format=format, transform_block_size=2 * get_format(format).group_size, **MSE)
    return wc.WushConfig(format=format, **ROWS[name].settings)


def measure(
    reference: torch.nn.Module,
    calibration: list,
    test: torch.Tensor,
    config: wc.WushConfig,
    method: Method | None = None,
) -> dict:
    """Quantizes a copy of the reference and compares it to the reference."""
    model = copy.deepcopy(reference)
    start = time.perf_counter()
    if method is not None:
        prepare(model, calibration, method, config.format, config.seed, progress=sys.stderr.isatty())
    wc.quantize(model, calibration, config, progress=sys.stderr.isatty())
    middle = time.perf_counter()
    result = compare(reference, model, test, TEST_WINDOW, progress=False)
    end = time.perf_counter()
    return {
        **result.to_dict(),
        "ratio": result.perplexity / result.reference_perplexity,
        "quantize_seconds": middle - start,
        "evaluate_seconds": end - middle,
    }


def line(name: str, row: dict) -> str:
    if "error" in row:
        return f"| {name} | {row['error']} | | | | | |"
    return (
        f"| {name} | {row['perplexity']:.2f} | {row['ratio']:.3f} | {row['kl']:.4f} | {100 * row['top1']:.1f} | "
        f"{row['quantize_seconds']:.0f} | {row['evaluate_seconds']:.0f} |"
    )


def finished(path: Path | None, head: dict) -> dict:
    """The rows of an earlier run in `path` that measured the same thing on the same device."""
    if path is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if any(earlier.get(key) != value for key, value in head.items() if key not in ("date", "command")):
        print(f"{path} holds another measurement: all rows are done again", flush=True)
        return {}
    return {key: row for key, row in earlier["rows"].items() if "error" not in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, help="JSON file, written after each row")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help="see --list")
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=64, help="windows of 2048 tokens; 0 for the whole text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--list", action="store_true", help="print the rows with their seconds on an H200, and stop")
    args = parser.parse_args()
    jobs = [
        (name, format)
        for format in args.formats
        for name in ROWS
        if name in args.rows and (ROWS[name].method is None or format in ROWS[name].method.formats)
    ]
    if args.list:
        for name in args.rows:
            print(f"{name:24}{ROWS[name].seconds:4} s   {ROWS[name].title}")
        print(f"{len(jobs)} runs in {len(args.formats)} formats: {sum(ROWS[name].seconds for name, _ in jobs)} s")
        return
    if args.data is None:
        parser.error("--data is needed: a folder with valid.txt and test.txt of WikiText-2 raw")
    where = common.device(args.device)
    reference, tokenizer = common.load_smollm2(args.model, where)
    calibration = torch.cat(
        windows(common.wikitext(args.data, "valid"), tokenizer, args.calibration_length, args.calibration_windows)
    )
    test = torch.cat(
        windows(common.wikitext(args.data, "test"), tokenizer, TEST_WINDOW, args.test_windows or None), dim=1
    )
    head = {
        **common.environment(where),
        "model": smollm2.FILE if args.model is None else args.model.name,
        "calibration": f"{args.calibration_windows} windows of {args.calibration_length} tokens of WikiText-2 valid",
        "test": f"{test.shape[1] // TEST_WINDOW} windows of {TEST_WINDOW} tokens of WikiText-2 test",
        "reference_perplexity": perplexity(reference, test, TEST_WINDOW, progress=False),
    }
    # Another run may add in another order, which changes the last bits.
    head["reference_perplexity"] = round(head["reference_perplexity"], 6)
    result = {**head, "rows": finished(args.out, head)}
    print(", ".join(f"{key}: {value}" for key, value in head.items()))
    print("\n| | perplexity | / bf16 | KL | top-1 % | quantize s | evaluate s |\n|---|---|---|---|---|---|---|")
    for name, format in jobs:
        key, config = f"{format} {name}", configuration(name, format)
        if result["rows"].get(key, {}).get("config") != config.to_dict():
            try:
                row = measure(reference, list(calibration.split(CALIBRATION_BATCH)), test, config, ROWS[name].method)
            except Exception as error:  # the other rows are worth having
                traceback.print_exc()
                row = {"error": f"{type(error).__name__}: {error}"}
            result["rows"][key] = {"title": ROWS[name].title, "config": config.to_dict(), **row}
            common.write_json(args.out, result)
            gc.collect()
        print(line(key, result["rows"][key]), flush=True)


if __name__ == "__main__":
    main()
