"""What a report's page shows, as plain data: from a model, or from a checkpoint that is read group by group."""

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.atomic import recover
from ..checkpoint.files import DIGEST, Shards, read_config, weight_files
from ..checkpoint.hf import empty_quantized
from ..checkpoint.layout import join_rows, parts, read_record
from ..checkpoint.record import quantization_of, read_report
from ..errors import CheckpointError, WushError
from ..graphs.printing import print_graph
from ..kernels.dispatch import arithmetic
from ..modules import WushGroup, named_groups
from .graphs import captured_stages, compiled_trace, first_layers
from .picture import picture
from .summary import bits_per_weight, by_reason, counted, model_bytes, quantized_bytes, settings_text
from .table import group_name, group_notes, worst_first
from .weights import WeightFacts, weight_facts

log = logging.getLogger("wush_compile")
EVALUATION = "wush_evaluation.json"
GPUS = {"A100": (8, 0), "L40S": (8, 9), "H100, H200": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}
# Numbers of a group's report that have a column of their own, or that the shape gives.
SHOWN = {"rows", "width", "tokens", "loss", "relative_loss", "seconds"}


@dataclass
class GroupFacts:
    """One group: a row of the table and its details. Numbers that are not known are None."""

    name: str
    rows: int | None = None
    width: int | None = None
    tokens: float | None = None
    loss: float | None = None
    relative_loss: float | None = None
    seconds: float | None = None
    nbytes: int | None = None
    notes: str = ""
    members: list[str] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)  # what else the run measured
    weights: WeightFacts | None = None
    inputs: dict[str, list[float]] | None = None  # `solver.facts.moment_curves`

    @property
    def depth(self) -> int | None:
        """The number of the group's layer: the first number in its path."""
        number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", self.name)
        return int(number[1]) if number else None

    @property
    def kind(self) -> str:
        """The path inside the layer, with `*` for further numbers: `self_attn.q_proj+k_proj`, `experts.*.up_proj`."""
        rest = re.split(r"(?:^|\.)\d+\.", self.name, maxsplit=1)[-1]
        return re.sub(r"(?<=\.)\d+(?=\.)", "*", re.sub(r"^\d+(?=\.)", "*", rest))

    @property
    def badness(self) -> float:
        """The relative loss for sorting: NaN is the worst, unknown the best."""
        loss = -math.inf if self.relative_loss is None else self.relative_loss
        return math.inf if math.isnan(loss) else loss


@dataclass
class Step:
    """A graph after one step: its text, and what `picture.picture` makes of it. `same`: like the step before."""

    name: str
    text: str
    picture: dict | None = None
    same: bool = False


@dataclass
class Contents:
    """What one report shows.

    title    the name of the model's class, or of the log
    head     (what, sentence): the lines on top
    facts    (name, text): settings, sizes and circumstances
    groups   worst first
    skipped  why -> names
    phases   phase -> seconds
    steps    graphs of a layer, in order
    notes    sentences about what could not be shown
    refresh  seconds after which a page that follows a run reloads; None for a finished page
    """

    title: str
    head: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    groups: list[GroupFacts] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refresh: int | None = None
    progress: tuple[int, int] | None = None  # groups done, groups in all


def number(value: object) -> float | None:
    """A number of a report, which may be edited: None for anything else."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def report_facts(report: dict) -> dict:
    """The fields of `GroupFacts` that come from a group's report or from its line in a log."""
    known = {name: value for name, entry in report.items() if (value := number(entry)) is not None}
    return {name: known.get(name) for name in ("tokens", "loss", "relative_loss", "seconds")} | {
        "measured": {name: value for name, value in sorted(known.items()) if name not in SHOWN},
        "inputs": _curves(report.get("input_power")),
    }


def _curves(given: object) -> dict[str, list[float]] | None:
    """The three curves of a group's activations; None for anything else, since a report may be edited."""
    names = ("before", "after", "spectrum")
    if not isinstance(given, dict) or not all(isinstance(given.get(name), list) for name in names):
        return None
    curves = {name: [number(value) for value in given[name][:256]] for name in names}
    good = all(c and all(v is not None and math.isfinite(v) and v >= 0 for v in c) for c in curves.values())
    return curves if good else None


def read_contents(source: nn.Module | str | os.PathLike, graphs: bool = True) -> Contents:
    """The contents of a quantized model's report, or of a checkpoint's, whose groups are read one at a time.

    Raises `WushError` for a model that is not quantized, and `CheckpointError` for a directory that cannot be read.
    """
    if isinstance(source, nn.Module):
        return _contents(source, worst_first(source), None, graphs)
    path = recover(source)
    config = read_config(path)
    shards = Shards(weight_files(path))
    record = read_record(config["quantization_config"])
    read_report(record, path)
    model = empty_quantized(path, config, record, shards.specs)
    for name in (name for _, group in named_groups(model) for _, pieces in parts(group) for name, _ in pieces):
        if name not in shards.specs:
            raise CheckpointError(f"the checkpoint lacks {name}: copy or save it again")

    def loaded() -> Iterator[WushGroup]:
        for empty in worst_first(model):
            buffers = {
                buffer: join_rows(empty, buffer, shards.tensors([name for name, _ in pieces]))
                for buffer, pieces in parts(empty)
            }
            absent = {name: None for name in empty._buffers if name not in buffers}
            yield type(empty)(empty.members, empty.recipe, empty.block_size, buffers | absent)

    return _contents(model, loaded(), read_evaluation(path, config), graphs)


def read_evaluation(directory: Path, config: dict) -> dict | None:
    """What `wush-compile evaluate --save` left beside a checkpoint; None without it, or if it is of other weights."""
    try:
        found = json.loads((directory / EVALUATION).read_text(encoding="utf-8"))
        return found if found[DIGEST] == config.get(DIGEST) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): the report shows no evaluation", directory / EVALUATION, error)
        return None


def write_evaluation(directory: Path, result: dict) -> None:
    """Writes the result of an evaluation beside a checkpoint, with the digest of the weights that it is of."""
    contents = {"evaluation_version": 1, DIGEST: read_config(directory).get(DIGEST), **result}
    text = json.dumps(contents, indent=1, sort_keys=True)
    (directory / EVALUATION).write_text(text + "\n", encoding="utf-8")


def _contents(
    model: nn.Module, groups: Iterator[WushGroup] | list[WushGroup], evaluation: dict | None, graphs: bool
) -> Contents:
    record = quantization_of(model)
    with torch.no_grad():
        facts = [_group_facts(group, record) for group in groups]
    before, after = model_bytes(model)
    tokens = max((f.tokens or 0 for f in facts), default=0)
    formats = sorted({group.format for _, group in named_groups(model)})
    rungs = sorted({(g.format, g.layout[1] if g.layout else "same") for _, g in named_groups(model)})
    config = record.config
    page = Contents(type(model).__name__, groups=facts, skipped=by_reason(record.ignored))
    page.head = [
        (
            "What it is",
            f"{page.title} with {counted(model)} in {len(facts)} groups; weights and activations in 4 bits "
            f"({', '.join(formats).upper()}), transform {config.transform}, solver {config.solver}.",
        ),
        (
            "How much smaller",
            f"{size(before)} before, {size(after)} now: {before / max(after, 1):.2f} times smaller. "
            f"{bits_per_weight(model)}.",
        ),
        ("How much is lost", _lost(facts, evaluation)),
        ("Where it is fast", _fast(rungs)),
    ]
    page.facts = [
        ("settings", settings_text(config)),
        ("quantized", size(quantized_bytes(model))),
        ("calibration", f"{tokens:.0f} tokens" if tokens else "no data"),
        ("solving", f"{sum(f.seconds or 0 for f in facts):.1f} s for all groups"),
    ]
    run = record.run or {}
    phases = run.get("seconds")
    page.phases = {str(k): v for k, v in phases.items() if number(v) is not None} if isinstance(phases, dict) else {}
    if isinstance(run.get("device"), str):
        page.facts.append(("device", run["device"]))
    if number(run.get("peak_memory")) is not None:
        page.facts.append(("peak memory", size(run["peak_memory"])))
    if graphs:
        _add_graphs(page, model)
    return page


def _group_facts(group: WushGroup, record) -> GroupFacts:
    facts = report_facts(record.report.get(group.members[0].name, {}))
    known = not group.weight_packed.is_meta and group.weight_packed.numel()
    return GroupFacts(
        group_name(group),
        group.shape[-2],
        group.shape[-1],
        nbytes=group.nbytes(),
        notes=group_notes(group, record),
        members=[member.name for member in group.members],
        weights=weight_facts(group) if known else None,
        **facts,
    )


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _lost(facts: list[GroupFacts], evaluation: dict | None) -> str:
    losses = [f.relative_loss for f in facts if f.relative_loss is not None and math.isfinite(f.relative_loss)]
    layers = "The losses of the groups are not known."
    if losses:
        worst = max((f for f in facts if f.relative_loss in losses), key=lambda f: f.relative_loss)
        layers = (
            f"A group's output loses {100 * sum(losses) / len(losses):.2f} % of its energy on average, and "
            f"{100 * worst.relative_loss:.2f} % at worst ({worst.name})."
        )
    known = {k: v for k, v in (evaluation or {}).items() if number(v) is not None}
    if "perplexity" not in known:
        return (
            f"{layers} No evaluation is kept: wush-compile evaluate DIR --text FILE --reference MODEL --save makes one."
        )
    text = f"Perplexity {known['perplexity']:.3f}"
    if "reference_perplexity" in known:
        text += f", {known['reference_perplexity']:.3f} before"
    if "kl" in known and "top1" in known:
        text += f"; KL divergence {known['kl']:.4f}, the same first token at {100 * known['top1']:.1f} % of positions"
    return f"{text} (on {evaluation.get('text', 'an unnamed text')}). {layers}"


def _fast(rungs: list[tuple[str, str]]) -> str:
    """How each kind of GPU multiplies each (format of weights, of activations); GPUs of one answer together."""
    lines = []
    for format, activation in rungs:
        words: dict[str, list[str]] = {}
        for name, capability in GPUS.items():
            words.setdefault(arithmetic(format, capability, activation), []).append(name)
        answers = "; ".join(f"{', '.join(names)}: {how}" for how, names in words.items())
        beside = {"same": "", "fp8": " with fp8 activations", "none": " with 16-bit activations"}[activation]
        lines.append(f"{format.upper()}{beside} on {answers}.")
    return " ".join(lines)


def _add_graphs(page: Contents, model: nn.Module) -> None:
    """The graph of the first layer as captured, and inside the compile backend after each pass.

    Only the first layers are traced, or the whole model where that fails.
    """
    try:
        try:
            page.steps = _steps(first_layers(model))
        except WushError:
            page.steps = _steps(model)
    except WushError as error:
        page.notes.append(f"The graph of a layer is not shown: {error}.")


def _steps(model: nn.Module) -> list[Step]:
    steps = []
    for when, stage in captured_stages(model).items():
        graph = stage.graph_module.graph
        steps.append(Step(f"captured, {when} quantization", print_graph(graph), picture(graph)))
    snapshots = compiled_trace(model).snapshots[1:]  # the first one is not lowered yet
    layer = 0 if snapshots[-1].text(0) else None
    last = None
    for snapshot in snapshots:
        text = snapshot.text(layer)
        name = "torch.compile, before its passes" if snapshot.step == "incoming" else f"after {snapshot.step}"
        steps.append(Step(name, text, None if text == last else picture(snapshot.graph, layer), text == last))
        last = text
    return steps
