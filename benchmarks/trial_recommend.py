"""Trial: is what `recommend` predicts true, and is what it chooses good? SmolLM2-135M-Instruct, WikiText-2.

    python benchmarks/trial_recommend.py --data FOLDER --out survey.json                     # what it predicts
    python benchmarks/trial_recommend.py --data FOLDER --part 0 15 --out part0.json          # at the same time
    python benchmarks/trial_recommend.py --data FOLDER --survey survey.json --out chosen.json
    python benchmarks/trial_recommend.py --survey survey.json --join part*.json chosen.json --out trial.json

A part quantizes the model by every 15th assignment of rungs to groups and measures its KL. 20 of them are random: each
draws how likely each rung is, then a rung for each group. At three costs between those of the uniform rungs there are
three that mix the next two uniform rungs at random, and, with `--survey`, the recommended one. Only that one depends
on the survey. The verdict is the rank correlation of predicted and measured KL over the random ones, and how much less
KL the recommended ones have than the mean of the mixed ones. Cost is bytes; `--gpu` and `--rows` make it time.
"""

import argparse
import copy
import json
import random
from dataclasses import asdict
from pathlib import Path

import common
import torch

import wush_compile as wc
from wush_compile.calibration.costs import GPUS, KEPT, Cost, machine, rungs
from wush_compile.calibration.recommend import Recommendation, choose, survey
from wush_compile.calibration.survey import Surveyed
from wush_compile.data import windows
from wush_compile.evaluation.language import compare

RANDOM, MIXES = 20, 3
NAMES = (*rungs("mxfp4"), KEPT)  # by falling KL
SHARES = (0.25, 0.5, 0.75)  # of the way from the cheapest uniform rung to 16 bits


def linears(model) -> list[Surveyed]:
    """The groups of a Llama in the order of `survey`, without predictions."""
    found = []
    for number, layer in enumerate(model.model.layers):
        for part, names in (("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))):
            some = [getattr(getattr(layer, part), f"{name}_proj") for name in names]
            members = tuple(f"model.layers.{number}.{part}.{name}_proj" for name in names)
            found.append(Surveyed(members, sum(m.out_features for m in some), some[0].in_features, {}))
    return found


def budgets(groups: list[Surveyed], cost: Cost) -> tuple[list[str], dict[str, float], dict[float, float]]:
    """The uniform rungs worth having by rising cost, where one of more bits loses less; the cost of each; the costs at
    which choices are compared."""
    total = {rung: sum(cost(g, rung) for g in groups) for rung in NAMES}
    uniform = sorted(NAMES, key=lambda r: (total[r], -NAMES.index(r)))
    uniform = [r for i, r in enumerate(uniform) if all(NAMES.index(r) > NAMES.index(b) for b in uniform[:i])]
    least = total[uniform[0]]
    return uniform, total, {share: least + share * (total[KEPT] - least) for share in SHARES}


def assignments(groups: list[Surveyed], cost: Cost) -> dict[str, list[str]]:
    """Name -> the rung of each group, for the random and the mixed ones."""
    found = {}
    for seed in range(RANDOM):
        chance = random.Random(seed)
        odds = [chance.expovariate(1.0) ** 2 for _ in NAMES]
        found[f"random {seed}"] = chance.choices(NAMES, odds, k=len(groups))
    uniform, total, at = budgets(groups, cost)
    for share, budget in at.items():
        low = max((r for r in uniform if total[r] <= budget), key=total.get)
        high = min((r for r in uniform if total[r] > budget), key=total.get)
        for seed in range(MIXES):
            order, chosen, spent = list(range(len(groups))), [low] * len(groups), total[low]
            random.Random(seed).shuffle(order)
            for i in order:
                more = cost(groups[i], high) - cost(groups[i], low)
                if spent + more <= budget:
                    chosen[i], spent = high, spent + more
            found[f"mixed {share} {seed}"] = chosen
    return found


def recommended(groups: list[Surveyed], cost: Cost) -> dict[str, list[str]]:
    """Name -> the rungs that `recommend` chooses at the same costs."""
    _, total, at = budgets(groups, cost)
    return {f"recommended {share}": choose(groups, cost, None, budget / total[KEPT]) for share, budget in at.items()}


def ranks(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def verdict(rows: dict[str, dict]) -> dict:
    """The rank correlation over random assignments, and the gain of the recommended ones over the mixed ones."""
    some = [row for name, row in rows.items() if name.startswith("random")]
    a, b = (ranks([row[key] for row in some]) for key in ("predicted", "kl"))
    gains = {}
    for share in SHARES:
        mixed = [row["kl"] for name, row in rows.items() if name.startswith(f"mixed {share} ")]
        if mixed and f"recommended {share}" in rows:
            gains[str(share)] = round(1 - rows[f"recommended {share}"]["kl"] / (sum(mixed) / len(mixed)), 3)
    return {"rank_correlation": round(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), 3), "less_kl": gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, default=Path("trial_recommend.json"))
    parser.add_argument("--survey", type=Path, help="what a first call has written")
    parser.add_argument("--part", type=int, nargs=2, metavar=("I", "N"))
    parser.add_argument("--join", type=Path, nargs="+", help="the files of all parts")
    parser.add_argument("--format", default="mxfp4", choices=["mxfp4", "nvfp4"])
    parser.add_argument("--gpu", "--device", choices=GPUS)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--test-windows", type=int, default=16)
    args = parser.parse_args()
    cost, config = Cost(args.format, args.gpu and machine(args.gpu), args.rows), wc.WushConfig(format=args.format)
    if args.survey is not None:
        known = json.loads(args.survey.read_text())["groups"]
        groups = [Surveyed(**{**g, "members": tuple(g["members"])}) for g in known]
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        rows = {name: row for part in parts for name, row in part["rows"].items()}
        for row in rows.values():
            settings = Recommendation(groups, row["rungs"], cost, config)
            row |= {"predicted": settings.kl, "share": settings.share}
        command = common.environment(torch.device("cpu"))["command"]
        result = {**parts[0], "command": command, "cost": str(cost), "rows": rows, **verdict(rows)}
        common.write_json(args.out, result)
        print({key: result[key] for key in ("rank_correlation", "less_kl")})
        return
    where = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, where)
    calibration = torch.cat(windows(common.wikitext(args.data, "valid"), tokenizer, 512, args.calibration_windows))
    data = list(calibration.to(where).split(8))
    if args.survey is None and args.part is None:
        groups = survey(model, data, config, progress=False)
        common.write_json(args.out, {**common.environment(where), "groups": [asdict(group) for group in groups]})
        return
    test = torch.cat(windows(common.wikitext(args.data, "test"), tokenizer, 2048, args.test_windows), dim=1)
    todo = list((recommended(groups, cost) if args.survey else assignments(linears(model), cost)).items())
    first, step = args.part or (0, 1)
    result = {**common.environment(where), "rows": {}}
    for name, chosen in todo[first::step]:
        settings = Recommendation(groups if args.survey else linears(model), chosen, cost, config)
        quantized = wc.quantize(copy.deepcopy(model), data, config, progress=False, **settings)
        # One window at a time: parts share the memory of a GPU.
        each = [compare(model, quantized, some, 2048, progress=False).kl for some in test.split(2048, dim=1)]
        kl = sum(each) / len(each)
        result["rows"][name] = {"kl": kl, "rungs": chosen}
        print(name, kl, flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
