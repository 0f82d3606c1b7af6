"""The part of `wush-compile evaluate` that runs tasks of lm-eval."""

from __future__ import annotations

import gc
import importlib.metadata
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .app import console, device_named, hide_bars, say

if TYPE_CHECKING:
    from ..evaluation.paired import Paired
    from ..evaluation.tasks import TaskScore


def evaluate_tasks(
    model: str,
    reference: str | None,
    names: list[str],
    folder: Path | None,
    shots: int | None,
    chat: bool,
    limit: int | None,
    batch: int | None,
    out: Path | None,
    device: str,
) -> None:
    """Runs the tasks on the model and on the reference, and prints both with recovery and intervals."""
    from ..checkpoint.source import load_model, load_tokenizer
    from ..evaluation.presets import settings_of
    from ..evaluation.task_file import TaskFile
    from ..evaluation.tasks import check_tasks, run_tasks, task_manager

    manager, where = task_manager(folder), device_named(device)
    settings = settings_of(names, shots, chat)
    hide_bars()
    head = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "limit": limit,
        "device": where.type,
        "settings": {s.name: asdict(s) for s in settings},
    }
    file = TaskFile(out, head)
    results: dict[str, list[TaskScore]] = {}
    for source in dict.fromkeys(filter(None, (reference, model))):
        finished = file.run(source, _stamp(source))
        left = [s for s in settings if s.name not in finished]
        if left:
            net, tokenizer = load_model(source)
            tokenizer = tokenizer or load_tokenizer(source)  # raises
            check_tasks(left, manager, tokenizer)
            net.to(where)
            for setting, scores in run_tasks(
                net, tokenizer, left, folder=folder, manager=manager, batch_size=batch, limit=limit
            ):
                file.put(source, setting.name, scores)
                finished[setting.name] = scores
            del net
            gc.collect()
        results[source] = [score for s in settings for score in finished[s.name]]
    console.print(_table(model, reference, results))
    if reference is not None:
        say("±: half a 95 % interval, from differences item by item. Recovery: the score in percent of the reference's")


def _stamp(source: str) -> dict:
    """Sizes and times of the files of a model: a checkpoint that was written anew is evaluated anew."""
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.suffix in (".safetensors", ".gguf")}


def _table(model: str, reference: str | None, results: dict[str, list[TaskScore]]) -> Table:
    from ..evaluation.tasks import compare_average, compare_scores

    own = results[model]
    if reference is None:
        table = Table("task", "metric", "items", "score")
        for score in own:
            table.add_row(score.task, score.metric, str(sum(len(s[2]) for s in score.strata)), _number(score))
        return table
    table = Table("task", "items", "reference", "score", "difference", "recovery %")
    for score, other in zip(own, results[reference], strict=True):
        table.add_row(f"{score.task}\n{score.metric}", *_cells(compare_scores(score, other), _scale(score)))
    if len(own) > 1 and all(_scale(score) == 100 for score in own):
        table.add_section()
        table.add_row("average", *_cells(compare_average(own, results[reference]), 100))
    return table


def _scale(score: TaskScore) -> int:
    """100 for a share, which tables give in percent; 1 for numbers of other kinds."""
    return 100 if 0 <= score.value <= 1 and score.metric.partition(",")[0] in ("acc", "acc_norm", "exact_match") else 1


def _number(score: TaskScore) -> str:
    return f"{score.value * _scale(score):.2f}"


def _cells(pair: Paired, scale: int) -> list[str]:
    recovery = "" if pair.recovery is None else f"{pair.recovery:.2f}" + _around(pair.recovery_interval, 1)
    difference = f"{scale * pair.difference:+.2f}" + _around(pair.difference_interval, scale)
    return [str(pair.items), f"{scale * pair.reference:.2f}", f"{scale * pair.score:.2f}", difference, recovery]


def _around(interval: tuple[float, float] | None, scale: int) -> str:
    """Half of an interval, which is symmetric."""
    return "" if interval is None else f" ±{scale * (interval[1] - interval[0]) / 2:.2f}"
