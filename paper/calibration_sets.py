"""The paper's Table 5 on SmolLM2: what the calibration set changes. KL to bf16 on WikiText-2 test, MXFP4.

    python paper/calibration_sets.py --data FOLDER --out calibration_sets.json

FOLDER holds valid.txt and test.txt of WikiText-2 raw. Sets of 128 windows of 512 tokens: WikiText-2 valid, the language
reference that Python ships, and text that the model samples from itself. Written after each row; goes on after a kill.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import accuracy
import common

import wush_compile as wc
from wush_compile.data import python_topics, sample_calibration_text, windows
from wush_compile.demo import smollm2
from wush_compile.evaluation.language import perplexity

WINDOWS, LENGTH = 128, 512
SETS = ("WikiText-2", "Python's language reference", "the model's own samples")
METHODS = {"RTN": wc.WushConfig(solver="rtn", token_weights="uniform"), "GPTQ": wc.WushConfig()}


def calibration(name: str, model: torch.nn.Module, tokenizer, data: Path) -> list[torch.Tensor]:
    """Batches of token ids, int64 [8, 512] each."""
    if name == SETS[2]:
        found = sample_calibration_text(model, tokenizer, WINDOWS, LENGTH, seed=0, progress=False)
    else:
        found = windows(
            common.wikitext(data, "valid") if name == SETS[0] else python_topics(), tokenizer, LENGTH, WINDOWS
        )
    return list(torch.cat(found).split(accuracy.CALIBRATION_BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sets", nargs="+", type=int, default=[0, 1, 2], choices=range(3), help="numbers of sets")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    where = common.device(args.device)
    reference, tokenizer = common.load_smollm2(args.model, where)
    pieces = windows(common.wikitext(args.data, "test"), tokenizer, accuracy.TEST_WINDOW, args.test_windows)
    test = torch.cat(pieces, dim=1)
    head = {
        **common.environment(where),
        "model": smollm2.FILE if args.model is None else args.model.name,
        "calibration": f"{WINDOWS} windows of {LENGTH} tokens",
        "test": f"{args.test_windows} windows of {accuracy.TEST_WINDOW} tokens of WikiText-2 test",
        "reference_perplexity": round(perplexity(reference, test, accuracy.TEST_WINDOW, progress=False), 6),
    }
    result = {**head, "rows": accuracy.finished(args.out, head)}
    for method in args.methods:
        for name in (SETS[i] for i in args.sets):
            key = f"{method}, {name}"
            if key not in result["rows"]:
                batches = calibration(name, reference, tokenizer, args.data)
                result["rows"][key] = accuracy.measure(reference, batches, test, METHODS[method])
                common.write_json(args.out, result)
            print(f"{key}: KL {result['rows'][key]['kl']:.4f}", flush=True)


if __name__ == "__main__":
    main()
