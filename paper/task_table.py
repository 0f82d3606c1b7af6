"""The paper's Tables 2 and 3 for a model: methods × formats on tasks, recovery, mean and spread over seeds.

    python paper/task_table.py MODEL --calibration text.txt --tasks paper-llama --out results.json
    python paper/task_table.py MODEL --calibration text.txt --tasks mine --task-dir tasks --out results.json --limit 100

MODEL is a directory, a GGUF file or a name on the hub. Every method of `wush_compile.baselines.METHODS` quantizes it,
once a seed; a seed chooses the calibration windows and what is random in a method. `--out` is written after each task
of each row; the same command goes on after a kill. `--show` prints the table of a file and runs nothing.

A row has the mean over seeds. Recovery is the average in percent of the reference's, ± its standard deviation over
seeds (with one seed: half the paired 95 % interval, marked *).
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from published import TASKS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common

import wush_compile as wc
from wush_compile.baselines import METHODS, quantize_by
from wush_compile.evaluation.presets import settings_of
from wush_compile.evaluation.task_file import TaskFile
from wush_compile.evaluation.tasks import TaskScore, compare_average, run_tasks, task_manager

REFERENCE = "reference"


def calibration(text: str, tokenizer, length: int, count: int, seed: int) -> list[torch.Tensor]:
    """`count` windows of a text, int64 [1, length] each, drawn by a seed; fewer if the text is shorter."""
    found = wc.windows(text, tokenizer, length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return [found[i] for i in order[:count]]


def measure(args: argparse.Namespace, file: TaskFile, run: str, job: tuple[str, str, int] | None) -> None:
    """Runs the tasks that a row lacks; job is (method, format, seed), None for the reference."""
    finished = file.run(run)
    left = [s for s in args.settings if s.name not in finished]
    if not left:
        return
    model, tokenizer = wc.load_model(args.model)
    tokenizer = tokenizer or wc.load_tokenizer(args.model)
    model.to(args.device)
    if job is not None:
        method, format, seed = job
        text = args.calibration.read_text(encoding="utf-8")
        quantize_by(
            method,
            model,
            calibration(text, tokenizer, args.window, args.count, seed),
            format,
            seed=seed,
            tokenizer=tokenizer,
        )
    for setting, scores in run_tasks(
        model, tokenizer, left, folder=args.task_dir, manager=args.manager, batch_size=args.batch, limit=args.limit
    ):
        file.put(run, setting.name, scores)
    del model
    gc.collect()


def rows(runs: dict) -> list[dict]:
    """The lines of the table from the runs of a file: by format and method, in the order of `METHODS`."""

    def scores(run: str) -> list[TaskScore]:
        return [TaskScore.from_dict(s) for task in runs[run]["tasks"].values() for s in task]

    reference = scores(REFERENCE)
    whole = set(runs[REFERENCE]["tasks"])
    lines = [{"format": "reference", "method": "-", "tasks": [100 * s.value for s in reference], "recovery": 100.0}]
    for format in ("nvfp4", "mxfp4"):
        for method in METHODS:
            seeds = [r for r in runs if r.split()[:2] == [format, method] and set(runs[r]["tasks"]) == whole]
            if not seeds:
                continue
            found = [compare_average(scores(run), reference) for run in seeds]
            recovery = [pair.recovery for pair in found]
            interval = found[0].recovery_interval
            if None in recovery:  # the reference has no point
                spread = None
            elif len(seeds) > 1:
                spread = statistics.stdev(recovery)
            else:
                spread = None if interval is None else (interval[1] - interval[0]) / 2
            values = [[100 * s.value for s in scores(run)] for run in seeds]
            lines.append(
                {
                    "format": format,
                    "method": method,
                    "tasks": [statistics.fmean(column) for column in zip(*values)],
                    "recovery": None if None in recovery else statistics.fmean(recovery),
                    "spread": spread,
                    "seeds": len(seeds),
                }
            )
    for line in lines:
        line["average"] = statistics.fmean(line["tasks"])
    return lines


def shown(result: dict) -> str:
    """The table of a file as Markdown, with the paper's recovery beside it where the model is the same."""
    names = [s["task"] for task in result["runs"][REFERENCE]["tasks"].values() for s in task]
    published = TASKS.get(Path(result["model"]).name, {})
    header = ["format", "method", *names, "average", "recovery %", *(["paper's recovery %"] if published else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for line in rows(result["runs"]):
        title = METHODS[line["method"]].title if line["method"] in METHODS else line["method"]
        mark = "*" if line.get("seeds") == 1 else ""
        spread = "" if line.get("spread") is None else f" ± {line['spread']:.2f}{mark}"
        cells = [line["format"].upper(), title, *(f"{v:.2f}" for v in line["tasks"]), f"{line['average']:.2f}"]
        cells.append("" if line["recovery"] is None else f"{line['recovery']:.2f}{spread}")
        if published:
            theirs = published.get((line["format"], line["method"]))
            cells.append("" if theirs is None else f"{theirs:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    if not published:
        lines.append(f"\nThe paper has no row of {Path(result['model']).name}: nothing of it stands beside.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on")
    parser.add_argument("--tasks", default="paper-llama", help="names of tasks or presets, with commas between")
    parser.add_argument("--task-dir", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4"], choices=["nvfp4", "mxfp4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=1024, help="calibration windows; the authors take 1024")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit", type=int, help="only the first items of each task")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    if args.show:
        print(shown(json.loads(args.out.read_text())))
        return
    if args.model is None or args.calibration is None:
        parser.error("MODEL and --calibration are needed")
    args.manager = task_manager(args.task_dir)
    args.settings = settings_of([name.strip() for name in args.tasks.split(",")])
    environment = common.environment(torch.device(args.device))
    about = {key: environment.pop(key) for key in ("device", "date", "command")}
    head = {
        **environment,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "model": Path(args.model).name,
        "calibration": f"{args.count} windows of {args.window} tokens of {args.calibration.name}",
        "limit": args.limit,
        "settings": {s.name: asdict(s) for s in args.settings},
    }
    file = TaskFile(args.out, head, about)
    measure(args, file, REFERENCE, None)
    for seed in args.seeds:
        for format in args.formats:
            for method in (m for m in args.methods if format in METHODS[m].formats):
                measure(args, file, f"{format} {method} {seed}", (method, format, seed))
                print(shown({**head, "runs": file.runs}), flush=True)


if __name__ == "__main__":
    main()
