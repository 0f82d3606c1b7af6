"""The times of the ladder's rungs on a GPU as a small table for `recommend`, from results of the kernels' benchmarks.

    python benchmarks/kernel_speed.py linear --activations fp8 none --out out
    python benchmarks/head_speed.py --rows 1 16 64 128 --out out/head_speed.json
    python benchmarks/rung_costs.py out/linear.json --head out/head_speed.json --out mine.json

`wc.recommend(gpu="mine.json")` takes the file. The table of an H200, wush_compile/calibration/gpu_times/h200.json, is
that of `benchmarks/results` (linear_activations_h200.json, head_speed_h200.json).

A row of the table has three numbers, none negative: microseconds = a constant, + one for each million weights, + one
for each thousand channels. They fit the shapes of the results with the least relative error; `worst` is what is left.
Weights of 8 bits were timed on one shape, the head's: their constant is that of bf16.
"""

import argparse
import itertools
import json
from pathlib import Path

import common
import torch

from wush_compile.calibration.costs import KEPT

COLUMNS = {KEPT: "bf16 us"} | {
    f"{format} {rung}": f"{format}{activations} us"
    for format in ("mxfp4", "nvfp4")
    for rung, activations in (("W4A4", ""), ("W4A8", " fp8"), ("W4A16", " none"))
}


def fit(shapes: list[tuple[int, int]], times: list[float]) -> tuple[list[float], float]:
    """Shapes (N, K) and their microseconds -> (constant, for each million weights, for each thousand channels), and
    the largest relative error."""
    terms = torch.tensor([[1.0, n * k / 1e6, k / 1e3] for n, k in shapes], dtype=torch.float64)
    terms /= torch.tensor(times, dtype=torch.float64)[:, None]
    found = []
    for kept in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in (1, 2, 3)):
        value = torch.zeros(3, dtype=torch.float64)
        value[list(kept)] = torch.linalg.lstsq(terms[:, kept], torch.ones(len(times), 1).double()).solution[:, 0]
        error = (terms @ value - 1).abs()
        if (value >= 0).all():
            found.append((float(error.square().sum()), [round(float(v), 5) for v in value], float(error.max())))
    return min(found)[1:]


def table(linear: dict, head: dict) -> dict:
    """{"us": rung -> rows -> three numbers, "worst": rung -> rows -> error} of two results."""
    us, worst = {}, {}
    for name, column in COLUMNS.items():
        for m in sorted({row["M"] for row in linear["rows"]}):
            rows = [row for row in linear["rows"] if row["M"] == m and row["group"] != "layer"]
            numbers, error = fit([(row["N"], row["K"]) for row in rows], [row[column] for row in rows])
            us.setdefault(name, {})[m], worst.setdefault(name, {})[m] = numbers, round(error, 3)
    n, k = head["shape"]
    for row in head["rows"]:
        constant = us[KEPT][row["M"]][0]
        each = (row["int8 us"] - constant) / (n * k / 1e6)
        us.setdefault("W8A16", {})[row["M"]] = [constant, round(each, 5), 0.0]
    return {"us": us, "worst": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("linear", type=Path)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("rung_costs.json"))
    args = parser.parse_args()
    linear, head = (json.loads(path.read_text()) for path in (args.linear, args.head))
    if linear["device"] != head["device"]:
        parser.error(f"{args.linear} is of {linear['device']} and {args.head} of {head['device']}")
    kept = {key: linear[key] for key in ("device", "date", "torch", "triton")}
    common.write_json(args.out, {**kept, "sources": [args.linear.name, args.head.name], **table(linear, head)})


if __name__ == "__main__":
    main()
