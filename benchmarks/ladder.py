"""The rungs of the precision ladder on SmolLM2-135M-Instruct and WikiText-2: 4, 8 or 16 bits, with and without an 8-bit
head.

    python benchmarks/ladder.py --data FOLDER --out ladder.json [--model FILE.gguf] [--formats mxfp4]
    python benchmarks/ladder.py --data FOLDER --out ladder.json --rungs mxfp4-same int8-none

The protocol is that of `accuracy.py`: calibration on the first 128 windows of 512 of valid, evaluation on the first 64
windows of 2048 of test. A rung is a format of weights and one of activations, for the linears of the decoder. Each is
quantized once, with an int8 head, which the tied embedding looks its rows up in. It is evaluated twice: as it is, and
with the head and the embedding in 16 bits. Each rung is a process of its own, and all run at the same time.
"""

import argparse
import copy
import itertools
import json
import subprocess
import sys
from pathlib import Path

import common
import torch

import wush_compile as wc
from wush_compile.data import windows
from wush_compile.evaluation.language import compare
from wush_compile.modules import named_groups

WINDOW = 2048
ACTIVATIONS = {"same": "same", "fp8": "fp8", "none": None}
RUNGS = ["-".join(rung) for rung in itertools.product(["mxfp4", "nvfp4"], ACTIVATIONS)] + ["int8-fp8", "int8-none"]


def measured(reference: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor, **what) -> dict:
    result = compare(reference, model, ids, WINDOW, progress=False)
    groups = sum(group.nbytes() for _, group in named_groups(model))
    others = {id(t): t for t in model.parameters()}
    nbytes = groups + sum(t.numel() * t.element_size() for t in others.values())
    return {**what, "kl": result.kl, "perplexity": result.perplexity, "top1": result.top1, "MiB": nbytes / 2**20}


def rows_of(rung: str, args: argparse.Namespace) -> list[dict]:
    """The rung with and without the 8-bit head."""
    where = common.device("auto")
    reference, tokenizer = common.load_smollm2(args.model, where)
    data = torch.cat(windows(common.wikitext(args.data, "valid"), tokenizer, 512, args.calibration)).to(where)
    ids = torch.cat(windows(common.wikitext(args.data, "test"), tokenizer, WINDOW, args.windows), dim=1)
    format, activations = rung.split("-")
    model = copy.deepcopy(reference)
    embedding, head = model.model.embed_tokens, model.lm_head
    wc.quantize(
        model,
        list(data.split(8)),
        format=format,
        activation_format=ACTIVATIONS[activations],
        head="int8",
        progress=False,
    )
    what = {"format": format, "activations": activations}
    rows = [measured(reference, model, ids, **what, head="int8")]
    model.model.embed_tokens, model.lm_head = embedding, head
    return [measured(reference, model, ids, **what, head="16 bits"), *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with WikiText-2 raw as valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file; fetched when left out")
    parser.add_argument("--rungs", nargs="+", default=RUNGS, choices=RUNGS, metavar="RUNG")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=64, help="windows of 2048 tokens")
    parser.add_argument("--out", type=Path, default=Path("ladder.json"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        for row in rows_of(args.rungs[0], args):
            print("ROW " + json.dumps(row), flush=True)
        return
    rest = [argument for argument in sys.argv[1:] if argument not in args.rungs and argument != "--rungs"]
    running = {
        rung: subprocess.Popen([sys.executable, __file__, *rest, "--one", "--rungs", rung], stdout=subprocess.PIPE)
        for rung in args.rungs
    }
    result = {
        **common.environment(common.device("auto")),
        "calibration": f"{args.calibration} windows of 512 tokens of WikiText-2 valid",
        "test": f"{args.windows} windows of {WINDOW} tokens of WikiText-2 test",
        "rows": [],
    }
    for rung, process in running.items():
        lines = process.communicate()[0].decode().splitlines()
        rows = [json.loads(line.removeprefix("ROW ")) for line in lines if line.startswith("ROW ")]
        print(*(rows or [f"{rung} failed"]), sep="\n", flush=True)
        result["rows"] += rows
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
