"""Trial: the settings of `trial_token_weights.py` on an encoder of sentences, which predicts no tokens.

    python benchmarks/trial_encoder.py --data FOLDER --model DIRECTORY --out trial.json

DIRECTORY holds a BERT-like encoder and its tokenizer (all-MiniLM-L6-v2). It is calibrated on 256 windows of 128 tokens
of WikiText-2 valid, and measured on 256 of test: the squared error of the mean-pooled, normalized embeddings, and of
all tokens' last hidden states relative to their power. Without logits a model's results are taken for the means of a
normal distribution.
"""

import argparse
import itertools
from pathlib import Path

import common
import torch
import trial_token_weights as trial
from transformers import AutoModel, AutoTokenizer

from wush_compile.data import windows

ROWS = (
    "hadamard",
    "uniform",
    "gradient",
    "gradient^1.5",
    "gradient^2",
    "uniform-loss",
    "gradient-loss^1.5",
    "gradient^1.5+1/8",
    "before",
    "sweeps",
    "sensitivity",
    "nearest",
    "default",
)


def outputs(model: torch.nn.Module, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings [windows, K], last hidden states [windows, tokens, K])."""
    with torch.no_grad():
        states = torch.cat([model(input_ids=batch).last_hidden_state.float() for batch in ids])
    return torch.nn.functional.normalize(states.mean(1), dim=-1), states


def errors(before: tuple[torch.Tensor, torch.Tensor], after: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Of what `outputs` has given before and after."""
    (embeddings, states), (found, other) = before, after
    return {
        "embedding_error": round(float((found - embeddings).square().sum(-1).mean()), 6),
        "state_error": round(float((other - states).square().sum() / states.square().sum()), 6),
    }


def load(
    directory: Path, data: Path, count: int, device: torch.device
) -> tuple[torch.nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    """(bf16 model, batches of calibration, batches of the test), `count` windows of 128 tokens each."""
    model = AutoModel.from_pretrained(directory, dtype=torch.bfloat16).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    calibration, test = (
        torch.cat(windows(common.wikitext(data, split), tokenizer, 128, count)).to(device).split(32)
        for split in ("valid", "test")
    )
    return model, list(calibration), list(test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, required=True, help="directory of an encoder with its tokenizer")
    parser.add_argument("--out", type=Path, default=Path("trial_encoder.json"))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=trial.ROWS)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--activations", nargs="+", default=list(trial.ACTIVATIONS), choices=list(trial.ACTIVATIONS))
    args = parser.parse_args()
    device = common.device("auto")
    model, data, ids = load(args.model, args.data, args.windows, device)
    before = outputs(model, ids)
    result = {**common.environment(device), "rows": []}
    for format, activations, name in itertools.product(args.formats, args.activations, args.rows):
        quantized = trial.quantize(model, data, format, activations, name)
        report = {"format": format, "activations": activations, "row": name, **errors(before, outputs(quantized, ids))}
        result["rows"].append(report)
        print(report, flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
