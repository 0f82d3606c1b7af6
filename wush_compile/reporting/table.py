"""The table of groups: shape, tokens, losses, seconds and size, largest relative loss first."""

import io
import math

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..checkpoint.record import Quantization, quantization_of
from ..modules import WushGroup, named_groups
from ..solver.experts import starved_experts

COLUMNS = ("group", "rows x width", "tokens", "loss", "relative", "seconds", "KiB")


def worst_first(model: nn.Module) -> list[WushGroup]:
    """The groups of a quantized model, largest relative loss first; those without a loss last, in the model's order."""
    report = quantization_of(model).report

    def badness(group: WushGroup) -> float:
        loss = report.get(group.members[0].name, {}).get("relative_loss", -math.inf)
        return math.inf if math.isnan(loss) else loss

    return sorted((group for _, group in named_groups(model)), key=badness, reverse=True)


def group_table(model: nn.Module, limit: int | None = None, width: int = 120) -> str:
    """The table of a model's groups, the worst first; `limit` is the number of groups that are shown.

    rows and width are the outputs (of all members) and the inputs of a group; of experts their number comes first.
    tokens is the calibration tokens that it saw, and seconds is the time that solving took. loss is eq. 1 of
    docs/spec.md §5, and relative is its share of the output's energy. KiB counts all buffers. A column `notes` says in
    which settings a group differs from the configuration, whose transform has smaller blocks than asked for, whose
    experts saw few tokens, and whose moment was damped more than once.
    """
    record = quantization_of(model)
    groups = worst_first(model)[:limit]
    notes = [group_notes(group, record) for group in groups]
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in (*COLUMNS, "notes") if any(notes) else COLUMNS:
        text = heading in ("group", "notes")
        table.add_column(heading, justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for group, note in zip(groups, notes, strict=True):
        table.add_row(*_row(group, record), *([note] if any(notes) else []))
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def group_name(group: WushGroup) -> str:
    """The first member's name, and the last parts of the others' (`layers.0.self_attn.q_proj+k_proj+v_proj`)."""
    first, *others = [member.name for member in group.members]
    return first + "".join(f"+{other.rpartition('.')[2]}" for other in others)


def _row(group: WushGroup, record: Quantization) -> tuple[str, ...]:
    report = record.report.get(group.members[0].name, {})
    return (
        group_name(group),
        " x ".join(map(str, group.shape)),
        str(report.get("tokens", "")),
        *(f"{report[key]:.2e}" if key in report else "" for key in ("loss", "relative_loss")),
        f"{report['seconds']:.2f}" if "seconds" in report else "",
        f"{group.nbytes() / 1024:.1f}",
    )


def group_notes(group: WushGroup, record: Quantization) -> str:
    """What is special about a group: other settings, smaller blocks, starved experts, more damping."""
    recipe = group.recipe
    notes = [f"{name}={value}" for name, value in recipe.changes_from(record.config).items()]
    if group.block_size < (recipe.transform_block_size or 0):
        notes.append(f"blocks of {group.block_size}")
    report = record.report.get(group.members[0].name, {})
    if starved := starved_experts(report, recipe):
        notes.append(f"few tokens for {len(starved)} of {report['experts']} experts")
    tries = report.get("damping_tries", 0)
    if tries > 1:
        notes.append(f"damped {tries} times")
    return ", ".join(notes)
