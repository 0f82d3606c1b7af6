"""Trial: activations of 4, 8 and 16 bits, and the power of s in WUSH's transform for each (docs/spec.md §2).

    python benchmarks/trial_activations.py --data FOLDER --model FILE.gguf --out trial.json
    python benchmarks/trial_activations.py --data FOLDER --out trial.json --formats mxfp4 --activations fp8 none

The model, the calibration and the test are those of `accuracy.py`: SmolLM2-135M-Instruct, 128 windows of 512 tokens of
WikiText-2 valid, 64 windows of 2048 of test. Each row quantizes the model anew. `--out` is written after each row.
"""

import copy
import itertools
import time

import common
import torch

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.demo import smollm2
from wush_compile.evaluation.language import compare
from wush_compile.solver import choose

ACTIVATIONS = {"same": "same", "fp8": "fp8", "none": None}
POWERS = (0.375, 0.5, 0.5625, 0.625, 0.75, 0.875, 1.0)


def measure(model, data, ids, format: str, activations: str, transform: str, power: float) -> dict:
    """KL, perplexity and top-1 agreement of one setting."""
    start = time.perf_counter()
    activation = ACTIVATIONS[activations]
    choose.POWER[activation] = power
    quantized = wc.quantize(
        copy.deepcopy(model), data, format=format, transform=transform, activation_format=activation, progress=False
    )
    measured = compare(model, quantized, ids, 2048, progress=False)
    return {
        "format": format,
        "activations": activations,
        "transform": transform,
        "power": power if transform == "wush" else None,
        "perplexity": round(measured.perplexity, 3),
        "kl": round(measured.kl, 4),
        "top1": round(measured.top1, 4),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = common.trial_parser(__doc__, __file__, needs_data=True)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--powers", nargs="+", type=float, default=POWERS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = smollm2.load() if args.model is None else wc.load_model(str(args.model))
    model.to(device)
    valid, test = ((args.data / f"{name}.txt").read_text(encoding="utf-8") for name in ("valid", "test"))
    data = torch.cat(windows(valid, tokenizer, 512, 128)).to(device).split(8)
    ids = torch.tensor(tokenizer(test, add_special_tokens=False, verbose=False)["input_ids"])[: 64 * 2048]
    result = {**common.environment(device), "rows": []}
    for format, activations in itertools.product(args.formats, args.activations):
        settings = [("hadamard", 0.5), ("identity", 0.5), *(("wush", power) for power in args.powers)]
        for transform, power in settings:
            result["rows"].append(measure(model, list(data), ids, format, activations, transform, power))
            print(result["rows"][-1], flush=True)
            common.write_json(args.out, result)


if __name__ == "__main__":
    main()
