"""The paper's Table 1 on SmolLM2: losses of RTN in the seven linears of a middle block, 5 transforms in 3 formats.

    python benchmarks/layer_loss.py --data FOLDER --out layer_loss.json

FOLDER holds valid.txt of WikiText-2 raw. The loss is eq. 1: ‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² / (n N). Each linear has a
transform of its own, with one block a group. `random` is the mean over several seeds. At the end the script says which
of the paper's orderings hold.
"""

import argparse
from pathlib import Path

import common
import torch

from wush_compile import WushConfig
from wush_compile.data import windows
from wush_compile.evaluation.layers import compare_layers

LETTERS = {"identity": "I", "random": "R", "hadamard": "H", "wus": "WUS", "wush": "WUSH"}
LINEARS = {
    "Q": "self_attn.q_proj",
    "K": "self_attn.k_proj",
    "V": "self_attn.v_proj",
    "O": "self_attn.o_proj",
    "G": "mlp.gate_proj",
    "U": "mlp.up_proj",
    "D": "mlp.down_proj",
}
# Rules that clip no more than the formats themselves do; the paper clips int4 for a Gaussian.
RULES = {"mxfp4": "absmax", "nvfp4": "absmax", "int4": "gaussian"}
# The paper's Table 1 (Qwen3-8B, block 18), columns Q K V O G U D. Only its orderings are used.
PAPER = {
    "mxfp4": {
        "I": (11.1, 12.0, 10.7, 4.35, 7.10, 6.56, 5.47),
        "R": (7.61, 7.73, 9.14, 3.84, 5.56, 5.68, 4.07),
        "H": (7.24, 7.20, 8.60, 3.79, 5.45, 5.61, 3.90),
        "WUS": (6.27, 7.22, 4.05, 3.57, 5.76, 4.75, 4.46),
        "WUSH": (3.34, 3.34, 3.30, 2.76, 4.49, 4.39, 3.39),
    },
    "nvfp4": {
        "I": (4.23, 4.35, 4.37, 2.34, 3.49, 3.41, 2.41),
        "R": (4.98, 5.01, 5.86, 2.54, 3.63, 3.68, 2.66),
        "H": (5.60, 5.62, 6.70, 2.58, 3.71, 3.79, 2.78),
        "WUS": (2.26, 2.36, 2.30, 2.00, 3.04, 3.01, 2.23),
        "WUSH": (2.40, 2.44, 2.28, 1.92, 3.09, 3.02, 2.33),
    },
    "int4": {
        "I": (170, 123, 13.2, 4.55, 55.9, 9.83, 19.3),
        "R": (5.79, 5.84, 6.96, 2.94, 4.22, 4.29, 3.10),
        "H": (5.57, 5.55, 6.80, 2.86, 4.09, 4.25, 3.03),
        "WUS": (213, 142, 10.7, 4.54, 50.2, 7.42, 13.1),
        "WUSH": (2.39, 2.43, 2.54, 2.10, 3.43, 3.43, 2.55),
    },
}


def configurations(random_runs: int) -> dict[str, WushConfig]:
    """Title `format transform seed` -> configuration."""
    table = {}
    for format, rule in RULES.items():
        for transform in LETTERS:
            for seed in range(random_runs if transform == "random" else 1):
                table[f"{format} {transform} {seed}"] = WushConfig(
                    format=format,
                    transform=transform,
                    solver="rtn",
                    weight_scale_rule=rule,
                    activation_scale_rule=rule,
                    activation_rounding="nearest",
                    seed=seed,
                )
    return table


def mean_over_seeds(row: dict[str, float], format: str, transform: str) -> float:
    values = [value for title, value in row.items() if title.rsplit(" ", 1)[0] == f"{format} {transform}"]
    return sum(values) / len(values)


def orderings(table: dict[str, dict[str, list[float]]]) -> list[str]:
    """In how many linears the paper's orderings hold here: those on which all its seven columns agree."""
    notes = []
    for format, paper in PAPER.items():
        letters = list(LETTERS.values())
        for index, a in enumerate(letters):
            for b in letters[index + 1 :]:
                signs = {x > y for x, y in zip(paper[a], paper[b], strict=True)}
                if len(signs) > 1:
                    continue
                low, high = (b, a) if signs == {True} else (a, b)
                here = [n for n, x, y in zip(LINEARS, table[format][low], table[format][high], strict=True) if x < y]
                other = "" if len(here) == len(LINEARS) else f" (not {' '.join(n for n in LINEARS if n not in here)})"
                notes.append(f"{format}: {low} < {high} in {len(here)} of {len(LINEARS)}{other}")
    return notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with valid.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--block", type=int, default=15, help="decoder block, of 30")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--random-runs", type=int, default=10)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    where = common.device(args.device)
    model, tokenizer = common.load_smollm2(args.model, where)
    data = torch.cat(windows(common.wikitext(args.data, "valid"), tokenizer, 512, args.windows))
    names = {letter: f"model.layers.{args.block}.{name}" for letter, name in LINEARS.items()}
    losses = compare_layers(model, list(data.split(8)), list(names.values()), configurations(args.random_runs))

    result = {**common.environment(where), "block": args.block, "calibration_tokens": data.numel(), **losses.to_dict()}
    for kind in ("loss", "relative"):
        table = {
            format: {
                letter: [mean_over_seeds(result[kind][name], format, transform) for name in names.values()]
                for transform, letter in LETTERS.items()
            }
            for format in RULES
        }
        title = "loss" if kind == "loss" else "relative loss, %"
        print(f"\n| {title} | | {' | '.join(LINEARS)} |\n{'|---' * (len(LINEARS) + 2)}|")
        for format, columns in table.items():
            for letter, values in columns.items():
                shown = " | ".join(f"{value if kind == 'loss' else 100 * value:.3g}" for value in values)
                print(f"| {format} | {letter} | {shown} |")
    result["orderings"] = orderings(table)
    print("\nThe orderings on which all columns of the paper's table agree:\n")
    print("\n".join(f"- {note}" for note in result["orderings"]))
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
