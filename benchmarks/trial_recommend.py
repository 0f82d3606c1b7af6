"""Trial: is what `recommend` predicts true, and is what it chooses good? SmolLM2-135M-Instruct, WikiText-2.

    python benchmarks/trial_recommend.py --data FOLDER --out survey.json                     # the survey alone
    python benchmarks/trial_recommend.py --data FOLDER --survey survey.json --part 0 8 --out part0.json
    python benchmarks/trial_recommend.py --join part*.json --out trial.json                  # the verdict

A part quantizes the model by every 8th assignment of rungs to groups and measures its KL. 20 of them are random: each
draws how likely each rung is, then a rung for each group. At three costs between those of the uniform rungs there are
the recommended assignment, and three that mix the next two uniform rungs at random at the same predicted cost. The
verdict is the rank correlation of predicted and measured KL over the random ones, and how much less KL the recommended
ones have than the mean of the mixed ones. Cost is bytes; `--gpu` and `--rows` make it time.
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
from wush_compile.calibration.recommend import GPUS, KEPT, Cost, Recommendation, choose, survey
from wush_compile.calibration.survey import Surveyed
from wush_compile.data import windows
from wush_compile.evaluation.language import compare

RANDOM, MIXES = 20, 3
SHARES = (0.25, 0.5, 0.75)  # of the way from the cheapest uniform rung to 16 bits


def assignments(groups: list[Surveyed], cost: Cost) -> dict[str, list[str]]:
    """Name -> the rung of each group."""
    names, found = [*groups[0].kl, KEPT], {}
    for seed in range(RANDOM):
        chance = random.Random(seed)
        odds = [chance.expovariate(1.0) ** 2 for _ in names]
        found[f"random {seed}"] = chance.choices(names, odds, k=len(groups))
    total = {rung: sum(cost(g, rung) for g in groups) for rung in names}
    loss = {rung: sum(g.kl.get(rung, 0.0) for g in groups) for rung in names}
    # The uniform rungs worth having, by rising cost.
    uniform = sorted(names, key=lambda r: (total[r], loss[r]))
    uniform = [r for i, r in enumerate(uniform) if all(loss[r] < loss[before] for before in uniform[:i])]
    for share in SHARES:
        budget = total[uniform[0]] + share * (total[KEPT] - total[uniform[0]])
        found[f"recommended {share}"] = choose(groups, cost, None, budget / total[KEPT])
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
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--join", type=Path, nargs="+", help="the files of all parts")
    parser.add_argument("--format", default="mxfp4", choices=["mxfp4", "nvfp4"])
    parser.add_argument("--gpu", "--device", choices=GPUS)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--test-windows", type=int, default=16)
    args = parser.parse_args()
    if args.join:
        parts = [json.loads(path.read_text()) for path in args.join]
        rows = {name: row for part in parts for name, row in part["rows"].items()}
        result = {**parts[0], "rows": rows, **verdict(rows)}
        common.write_json(args.out, result)
        print({key: result[key] for key in ("rank_correlation", "less_kl")})
        return
    where = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, where)
    calibration = torch.cat(windows(common.wikitext(args.data, "valid"), tokenizer, 512, args.calibration_windows))
    data, config = list(calibration.to(where).split(8)), wc.WushConfig(format=args.format)
    if args.survey is None:
        groups = survey(model, data, config, progress=False)
        common.write_json(args.out, {**common.environment(where), "groups": [asdict(group) for group in groups]})
        return
    groups = [Surveyed(**{**g, "members": tuple(g["members"])}) for g in json.loads(args.survey.read_text())["groups"]]
    cost = Cost(args.format, GPUS.get(args.gpu), args.rows)
    test = torch.cat(windows(common.wikitext(args.data, "test"), tokenizer, 2048, args.test_windows), dim=1)
    result = {**common.environment(where), "rows": {}}
    for number, (name, chosen) in enumerate(assignments(groups, cost).items()):
        if number % args.part[1] != args.part[0]:
            continue
        settings = Recommendation(groups, chosen, cost, config)
        quantized = wc.quantize(copy.deepcopy(model), data, config, progress=False, **settings)
        kl = compare(model, quantized, test, 2048, progress=False).kl
        row = {"predicted": settings.kl, "share": settings.share, "kl": kl, "rungs": chosen}
        result["rows"][name] = row
        print(name, {key: row[key] for key in ("predicted", "share", "kl")}, flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
