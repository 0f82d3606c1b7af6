"""Trial: what else could lower the loss of four bits, alone and together: quantizers of activations, factors of rows,
GPTQ's order, learned transforms. The library has feedback in four steps and the order.

    python benchmarks/trial_frontier.py --data FOLDER --out trial.json --formats mxfp4 --rows default feedback-2

The protocol is that of `trial_token_weights.py`, and `default` is its default. Quantized linears are computed by
references in fp32, in calibration and in the test, so that a row may change the quantizer of activations:

    feedback-N    A group is rounded in N steps, and each takes up what the ones before lost: with S̃ = T⁻ᵀ S T⁻¹, what
                  errors of the transformed input cost (docs/spec.md §2), channels J are rounded from what is best
                  given the errors e of the channels behind them: GPTQ, for activations, inside a block
    candidates-N  scales of activations from N candidates by squared error
    token-N       a factor a token, of N in [1, 2), by the squared error of its row, which the product takes back
    rows-N        a factor a row of the weight, of N in [1, 2), by GPTQ's loss (MXFP4)
    spread-N      feedback in N steps, whose pairs of singular values are as unlike as can be
    noise-N       weights for inputs with rounding errors of N of their power: (W H)(H + N)^-1 is rounded by GPTQ
    bias          the mean error of each output, on the observer's sample, as a bias
    order         GPTQ begins with the blocks of largest power, as the library does; other rows keep the model's
    own           a transform for each linear
    learned-N     N gradient steps on all transforms by the whole model's KL (learn_transforms.py), then solved anew
"""

import copy
import itertools
import time

import common
import frontier_patches as patches
import trial_token_weights as trial
from frontier_patches import Row
from learn_transforms import learn

import wush_compile as wc
from wush_compile.evaluation.language import compare
from wush_compile.solver import choose

# Of the error of rounding weights to nearest, in learning: GPTQ's costs less.
WEIGHT_SHARE = 0.6
OWN = {"share_transform": False}
# The rows put their own quantizers in place of the library's.
NEAREST = {"activation_rounding": "nearest"}
RULE = {"mxfp4": "mse", "nvfp4": "loss"}  # of weights' scales; with `best` MXFP4 has factors of rows besides
ROWS = {
    "default": Row(),
    "own": Row(changes=OWN),
    "power-1/16": Row(power=-0.0625),
    "feedback-2": Row(2),
    "feedback-4": Row(4),
    "feedback-all": Row(32),
    "feedback-2-1/16": Row(2, power=-0.0625),
    "feedback-4-1/16": Row(4, power=-0.0625),
    "feedback-4-1/8": Row(4, power=-0.125),
    "feedback-all-1/8": Row(32, power=-0.125),
    "feedback-all-1/4": Row(32, power=-0.25),
    "feedback-4-4-priced": Row(4, 4, priced=True),
    "feedback-4-1/8-4-priced": Row(4, 4, priced=True, power=-0.125),
    "candidates-3": Row(candidates=3),
    "candidates-4": Row(candidates=4),
    "candidates-6": Row(candidates=6),
    "candidates-12": Row(candidates=12),
    "token-2": Row(tokens=2),
    "token-4": Row(tokens=4),
    "rows-4": Row(rows=4),
    "bias": Row(bias=True),
    "order": Row(order=True),
    "learned-100": Row(learned=100),
    "learned-300": Row(learned=300, rate=2e-3),
    "damping-.03": Row(changes={"damping": 0.03}),
    "sweeps-4": Row(changes={"sweeps": 4}),
    "token-4-rows-4": Row(tokens=4, rows=4),
    "token-4-rows-4-own": Row(tokens=4, rows=4, changes=OWN),
    "feedback-4-rows-4": Row(4, rows=4),
    "feedback-4-1/8-token-4-rows-4": Row(4, tokens=4, rows=4, power=-0.125),
    "feedback-4-1/8-own": Row(4, power=-0.125, changes=OWN),
    "feedback-4-1/8-token-4-rows-4-own": Row(4, tokens=4, rows=4, power=-0.125, changes=OWN),
    "candidates-4-own": Row(candidates=4, changes=OWN),
    "feedback-4-1/8-4-priced-own": Row(4, 4, priced=True, power=-0.125, changes=OWN),
    "feedback-all-1/8-12-priced": Row(32, 12, priced=True, power=-0.125),
    "learned-100-feedback-4": Row(4, learned=100),
    **{f"spread-{n}": Row(n, spread=n) for n in (2, 4, 8)},
    "spread-4-1/16": Row(4, spread=4, power=-0.0625),
    "spread-4-4-priced": Row(4, 4, priced=True, spread=4),
    **{f"noise-{n}": Row(noise=n) for n in (0.003, 0.007, 0.0134, 0.025)},
    **{f"spread-4-noise-{n}": Row(4, spread=4, noise=n) for n in (0.003, 0.007, 0.0134, 0.025)},
    "spread-4-rows-4": Row(4, spread=4, rows=4),
    "spread-4-bias": Row(4, spread=4, bias=True),
    "spread-4-order": Row(4, spread=4, order=True),
    "spread-4-sweeps-4": Row(4, spread=4, changes={"sweeps": 4}),
    "feedback-4-order": Row(4, order=True),
    "feedback-4-noise": Row(4, noise=0.003),
    "feedback-4-order-noise": Row(4, order=True, noise=0.003),
    "feedback-4-order-noise-1/16": Row(4, order=True, noise=0.003, power=-0.0625),
    "feedback-4-candidates-4": Row(4, 4),
}


def measure(model, data, ids, window: int, format: str, name: str) -> dict:
    """KL, perplexity and top-1 agreement of one setting."""
    patches.ROW = row = ROWS[name]
    choose.POWER["same"] = trial.POWER["same"] + row.power
    start = time.perf_counter()
    settings = NEAREST | {"weight_scale_rule": RULE[format]} | row.changes
    patches.GIVEN.clear()
    changed = wc.quantize(copy.deepcopy(model), data, format=format, progress=False, **settings)
    learning = 0.0
    if row.learned:
        begin = time.perf_counter()
        found = learn(model, copy.deepcopy(model), changed, data, row.learned, row.rate, WEIGHT_SHARE)
        learning = time.perf_counter() - begin
        patches.GIVEN.update(found)
        changed = wc.quantize(copy.deepcopy(model), data, format=format, progress=False, **settings)
    middle = time.perf_counter()
    measured = compare(model, changed, ids, window, progress=False)
    return {
        "format": format,
        "row": name,
        "perplexity": round(measured.perplexity, 3),
        "kl": round(measured.kl, 4),
        "top1": round(measured.top1, 4),
        "learn_seconds": round(learning, 1),
        "quantize_seconds": round(middle - start, 1),
        "evaluate_seconds": round(time.perf_counter() - middle, 1),
    }


def main() -> None:
    parser = common.trial_parser(__doc__, __file__)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--first-window", type=int, default=0, help="of calibration")
    parser.add_argument("--test-windows", type=int, default=64, help="windows of 2048 tokens")
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    counts = args.calibration_windows, args.test_windows, args.first_window
    data, ids, window = common.smollm2_texts(args.data, tokenizer, device, *counts)
    patches.patch()
    result = {**common.environment(device), "rows": []}
    for name, format in itertools.product(args.rows, args.formats):
        result["rows"].append(measure(model, data, ids, window, format, name))
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
