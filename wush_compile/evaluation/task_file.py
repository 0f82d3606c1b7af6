"""The file of task results: written after each task, read by the same command after a kill."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import DataError
from .tasks import TaskScore

VERSION = 1


class TaskFile:
    """Scores by run (a model, or a row of a table) and task. Without a path it only keeps them in memory.

    A file of other settings than `head` is not overwritten: `DataError`. `about` stands before them, and may differ
    from what an earlier command wrote: a date, the command.
    """

    def __init__(self, path: Path | None, head: Mapping, about: Mapping | None = None):
        self.path, self.head, self.about = path, {"task_results_version": VERSION, **head}, dict(about or {})
        self.runs: dict[str, dict] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.runs = found.pop("runs")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path} is no file of task results: name another with --out") from error
            settings = {key: value for key, value in found.items() if key not in self.about}
            differing = [key for key in {**settings, **self.head} if settings.get(key) != self.head.get(key)]
            if differing:
                raise DataError(
                    f"{path} holds results with another {', '.join(differing)}: name another file, or delete it"
                )

    def run(self, name: str, stamp: Mapping | None = None) -> dict[str, list[TaskScore]]:
        """The finished tasks of a run, by task. A run whose stamp (what it measured) has changed begins again."""
        entry = self.runs.get(name)
        if entry is None or entry["stamp"] != (dict(stamp) if stamp is not None else None):
            self.runs[name] = {"stamp": None if stamp is None else dict(stamp), "tasks": {}}
        return {
            task: [TaskScore.from_dict(score) for score in scores] for task, scores in self.runs[name]["tasks"].items()
        }

    def put(self, name: str, task: str, scores: list[TaskScore]) -> None:
        """Adds a finished task to a run, and replaces the file whole."""
        self.runs[name]["tasks"][task] = [score.to_dict() for score in scores]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f".{self.path.name}.partial")
            contents = {**self.about, **self.head, "runs": self.runs}
            partial.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
