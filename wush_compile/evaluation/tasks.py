"""Tasks of lm-eval (the extra `eval`) on models in memory, with the score of each item.

A task is one of the harness' own, or a YAML file of the harness in a folder of the user's. Its score is the harness'
number; the scores of the items are kept besides, since two models are compared item by item (`paired.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ConfigError, DataError, WushError, one_of
from .language import inference_mode
from .paired import Paired, Stratum, average, mean, paired
from .presets import PRESETS, TaskSetting

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# The number of a task that counts, if its setting names none: the first of these that it has, in this order.
METRICS = ("exact_match", "acc_norm", "acc")
MAX_LENGTH = 4096
PLATINUM = Path(__file__).parent / "platinum"
# A harness' number that differs more from the mean of the items is no mean of them.
SAME = 1e-9


@dataclass(frozen=True)
class TaskScore:
    """What a model scores on a task. `value` is the harness' number.

    `strata` has, for each subtask (a task is its own), its name, its weight in `value` and the scores of its items in
    the order of the items; it is empty if `value` is no mean of items. `items` identifies the items and their order.
    `others` has the harness' other numbers by "metric,filter".
    """

    task: str
    metric: str
    value: float
    higher_is_better: bool
    strata: tuple[tuple[str, float, tuple[float, ...]], ...]
    items: str
    others: Mapping[str, float]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> TaskScore:
        strata = tuple((name, weight, tuple(values)) for name, weight, values in fields["strata"])
        return cls(**{**fields, "strata": strata})


def require_harness() -> None:
    """Raises `ConfigError` if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks need the lm-eval package: pip install 'wush-compile[eval]'")


def task_manager(folder: Path | None = None) -> TaskManager:
    """The harness' index of its own tasks, of PlatinumBench, and of those in a folder, which come first."""
    require_harness()
    from lm_eval.tasks import TaskManager

    if folder is not None and not Path(folder).is_dir():
        raise DataError(f"there is no folder {folder}: give one that holds YAML files of lm-eval tasks")
    return TaskManager(include_path=[str(Path(path).resolve()) for path in (PLATINUM, folder) if path is not None])


def check_tasks(settings: Sequence[TaskSetting], manager: TaskManager, tokenizer) -> None:
    """Raises `ConfigError` for a task that the harness does not know, and for chat without a template."""
    if not settings:
        raise ConfigError("no task is named: give names of tasks")
    for setting in settings:
        one_of("task", setting.name, (*PRESETS, *manager.all_tasks))
        if setting.chat and getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"{setting.name} is asked as a chat, but the tokenizer has no chat template: leave it out"
            )


def run_tasks(
    model: nn.Module,
    tokenizer,
    settings: Sequence[TaskSetting],
    *,
    folder: Path | None = None,
    manager: TaskManager | None = None,
    batch_size: int | str | None = None,
    limit: int | None = None,
    max_length: int = MAX_LENGTH,
    thinking: bool = False,
) -> Iterator[tuple[TaskSetting, list[TaskScore]]]:
    """Runs tasks on a causal language model, one after the other. Yields each with its scores: one, or those of a tag.

    model       a transformers model, on its device: a checkpoint of ours, or one in full precision
    folder      of YAML files of tasks. Paths of data files in them are relative to it
    batch_size  requests in one forward, or `auto`, what fits; by default 8 on a CPU, and else `auto`
    limit       only the first items of each task
    max_length  tokens that a model sees at most
    thinking    whether a chat template that can leave thinking out (Qwen3) keeps it

    Few-shot examples are drawn with the harness' fixed seed, so two models see the same. Raises `ConfigError` for an
    unknown task or if lm-eval is missing, and `DataError` if the data of a task cannot be had.
    """
    require_harness()
    if not hasattr(model, "generate") or getattr(model, "config", None) is None:
        raise DataError(f"{type(model).__name__} is no language model of transformers, which tasks of lm-eval need")
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    if not logging.getLogger("wush_compile").isEnabledFor(logging.INFO):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if getattr(tokenizer, "bos_token_id", None) is None and getattr(tokenizer, "eos_token_id", None) is None:
        raise ConfigError(
            "the tokenizer has neither a BOS nor an EOS token, and lm-eval begins a text with one: set one"
        )
    manager = manager or task_manager(folder)
    check_tasks(settings, manager, tokenizer)
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None) or max_length
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size or (8 if model.device.type == "cpu" else "auto"),
        max_length=min(max_length, known),
        enable_thinking=thinking,
    )
    for setting in settings:
        loaded = _load(setting.name, manager, folder)
        with inference_mode([model]):
            try:
                results = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=loaded,
                    num_fewshot=setting.shots,
                    limit=limit,
                    apply_chat_template=setting.chat,
                    fewshot_as_multiturn=setting.chat,
                    task_manager=manager,
                    bootstrap_iters=0,
                )
            except ValueError as error:  # a task that the harness refuses to run
                raise DataError(f"lm-eval cannot run {setting.name}: {_first_line(error)}") from error
        yield setting, _scores(setting, results)


def _load(name: str, manager: TaskManager, folder: Path | None) -> list:
    """The harness' objects of a task, a group or a tag, with their data."""
    try:
        with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
            found = manager.load([name])
    except WushError:
        raise
    except Exception as error:  # whatever data sets, a network or a YAML file raise
        raise DataError(
            f"the task {name} cannot be loaded ({_first_line(error)}): run where its data can be fetched or is cached, "
            "or give a folder with a task whose data files are local"
        ) from error
    inside = {task for group in found["groups"].values() for task in (t.task_name for t in group.get_all_tasks())}
    nested = {child for children in found["group_map"].values() for child in children}
    groups = [group for title, group in found["groups"].items() if title not in nested]
    return groups + [task for title, task in found["tasks"].items() if title not in inside]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300] or type(error).__name__


def _scores(setting: TaskSetting, results: dict) -> list[TaskScore]:
    """A group or task is one score; a tag, which has no number of its own, is a score for each of its tasks."""
    leaves = results["samples"]
    if setting.name in results["results"]:
        return [_score(setting.name, setting.metric, list(leaves), results)]
    if len(leaves) == 1:  # the name of a YAML file
        return [_score(next(iter(leaves)), setting.metric, list(leaves), results)]
    return [_score(leaf, setting.metric, [leaf], results) for leaf in leaves]


def _score(title: str, metric: str | None, leaves: list[str], results: dict) -> TaskScore:
    own = results["results"][title]
    numbers = {
        key: float(value)
        for key, value in own.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    if not numbers:
        raise DataError(f"lm-eval has no number for {title}: give the tasks of the group by name")
    if metric is None:
        metric = next((k for m in METRICS for k in numbers if k.startswith(f"{m},")), next(iter(numbers)))
    if metric not in numbers:
        raise ConfigError(f"{title} has no {metric}, but {', '.join(numbers)}: take one of these")
    name, _, kept = metric.partition(",")
    values, digest = {}, hashlib.sha256()
    for leaf in leaves:
        samples = sorted((s for s in results["samples"][leaf] if s["filter"] == kept), key=lambda s: s["doc_id"])
        for sample in samples:
            digest.update(f"{leaf} {sample['doc_id']} {sample['doc_hash']} {sample['prompt_hash']}\n".encode())
        values[leaf] = [float(s[name]) for s in samples if isinstance(s.get(name), int | float)]
        if len(values[leaf]) < len(samples) or not samples:
            values = {}
            break
    higher = results.get("higher_is_better", {}).get(title)
    higher = higher.get(name) if isinstance(higher, dict) else higher
    return TaskScore(
        title,
        metric,
        numbers[metric],
        higher is not False,
        _strata(values, numbers[metric]),
        digest.hexdigest(),
        {key: value for key, value in numbers.items() if key != metric},
    )


def _strata(values: Mapping[str, list[float]], value: float) -> tuple[tuple[str, float, tuple[float, ...]], ...]:
    """The subtasks with their weights: by size, else alike, whichever gives the harness' number; else none."""
    total = sum(map(len, values.values()))
    if not total:
        return ()
    for weights in ([len(v) / total for v in values.values()], [1 / len(values)] * len(values)):
        same = math.fsum(w * mean(v) for w, v in zip(weights, values.values(), strict=True))
        if abs(same - value) <= SAME * max(1.0, abs(value)):
            return tuple((name, w, tuple(v)) for (name, v), w in zip(values.items(), weights, strict=True))
    return ()


def _paired_strata(score: TaskScore, reference: TaskScore) -> list[Stratum] | None:
    """The strata of both, pooled where they are weighted by size; None if a score is no mean of items.

    Raises `DataError` if the models did not answer the same items.
    """
    if score.items != reference.items or [s[0] for s in score.strata] != [s[0] for s in reference.strata]:
        raise DataError(
            f"{score.task}: the two models did not see the same items and prompts: give both the same data, limit and "
            "tokenizer's template"
        )
    if not score.strata or not reference.strata:
        return None
    pairs = list(zip(score.strata, reference.strata, strict=True))
    total = sum(len(values) for _, _, values in score.strata)
    if all(math.isclose(weight, len(values) / total) for _, weight, values in score.strata):
        return [Stratum(1.0, [x for a, _ in pairs for x in a[2]], [x for _, b in pairs for x in b[2]])]
    return [Stratum(a[1], a[2], b[2]) for a, b in pairs]


def compare_scores(score: TaskScore, reference: TaskScore) -> Paired:
    """A model's score beside a reference's on the same items. Without items the intervals are None.

    Raises `DataError` if the models did not answer the same items.
    """
    strata = _paired_strata(score, reference)
    return paired(strata) if strata is not None else _unpaired(score.value, reference.value)


def compare_average(scores: Sequence[TaskScore], references: Sequence[TaskScore]) -> Paired:
    """The plain average over tasks beside the reference's, as the paper's tables have it."""
    strata = [_paired_strata(a, b) for a, b in zip(scores, references, strict=True)]
    if all(s is not None for s in strata):
        return average(strata)
    return _unpaired(mean([s.value for s in scores]), mean([s.value for s in references]))


def _unpaired(score: float, reference: float) -> Paired:
    ratio = 100 * score / reference if reference else None
    return Paired(score, reference, score - reference, None, ratio, None, 0)
