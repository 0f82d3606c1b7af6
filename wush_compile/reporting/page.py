"""`report`: one self-contained page about a quantized model, or about two of them side by side.

Everything that comes from a checkpoint is escaped (Jinja2's autoescape). The page's only script is allowed by its hash,
and the page may load nothing: a name that got through unescaped would still not run.
"""

import base64
import hashlib
import math
import os
from collections.abc import Sequence
from importlib.resources import files

import jinja2
from markupsafe import Markup
from torch import nn

from . import plots
from .contents import Contents, GroupFacts, read_contents

PACKAGE = files(__package__)  # page.css, page.js and page.html.j2
MOST_KINDS = 24  # charts of losses by depth
HEADINGS = ("group", "rows", "width", "tokens", "loss", "relative loss", "seconds", "KiB")
PAIR_HEADINGS = ("group", "relative loss A", "relative loss B", "B over A", "seconds A", "seconds B", "KiB A", "KiB B")


def report(
    model: nn.Module | str | os.PathLike, other: nn.Module | str | os.PathLike | None = None, *, graphs: bool = True
) -> str:
    """A page (HTML) about a quantized model: sizes, losses, groups, weights, times, and what was left alone.

    model, other
        A quantized model, or the directory of a checkpoint, whose weights are read group by group. With `other` the
        page compares the two; groups that changed most come first.
    graphs
        Whether to trace the graph of the first layer, before and after each pass.

    The page holds everything that it shows: it needs no network, and equal checkpoints give equal bytes with the same
    versions of torch and matplotlib. Raises `WushError` for a model that is not quantized, and without matplotlib.
    """
    sources = [model] if other is None else [model, other]
    names = [type(s).__name__ if isinstance(s, nn.Module) else os.path.basename(os.path.abspath(s)) for s in sources]
    return render([read_contents(source, graphs) for source in sources], names)


def render(pages: Sequence[Contents], names: Sequence[str]) -> str:
    """The page of one report, or of two. `names` tell them apart."""
    style, script, template = (
        PACKAGE.joinpath(f"page.{end}").read_text(encoding="utf-8") for end in ("css", "js", "html.j2")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pair = len(pages) == 2
    charts, left = _depth_charts(pages)
    phases, title = _phase_chart(pages)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template).render(
        pages=list(pages),
        names=names,
        labels="AB",
        pair=pair,
        title=f"{names[0]} and {names[1]}" if pair else f"{names[0]}: {pages[0].title}",
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
        refresh=pages[0].refresh,
        style=Markup(style),
        script=Markup(script),
        depth_charts=charts,
        kinds_left=left,
        phase_chart=phases,
        phase_title=title,
        headings=PAIR_HEADINGS if pair else HEADINGS,
        sorted_by=3 if pair else 5,
        order="those that changed most first" if pair else "largest relative loss first",
        rows=_pair_rows(*pages) if pair else _rows(pages[0]),
        curves=lambda curves, label: Markup(plots.small_curves(curves, label)),
        histogram=_histogram,
        spread=lambda curve: f"{curve[0] / max(curve[-1], 1e-9):.3g} times",
        percent=lambda share: f"{100 * share:.3g} %",
    )


# -- the table -------------------------------------------------------------------------------------------------------


def _kib(facts: GroupFacts | None) -> float | None:
    return None if facts is None or facts.nbytes is None else facts.nbytes / 1024


def _rows(page: Contents) -> list[dict]:
    return [
        {
            "name": g.name,
            "notes": g.notes,
            "cells": [
                (g.rows, "%d"),
                (g.width, "%d"),
                (g.tokens, "%.0f"),
                (g.loss, "%.2e"),
                (g.relative_loss, "%.2e"),
                (g.seconds, "%.2f"),
                (_kib(g), "%.1f"),
            ],
            "facts": [_Sided(g, 0)] if g.weights or g.measured else [],
        }
        for g in page.groups
    ]


class _Sided:
    """A group's facts, and which report they are of."""

    def __init__(self, facts: GroupFacts, side: int):
        self.side, self._facts = side, facts

    def __getattr__(self, name: str):
        return getattr(self._facts, name)


def _pair_rows(first: Contents, second: Contents) -> list[dict]:
    ours, theirs = ({g.name: g for g in page.groups} for page in (first, second))
    rows = []
    for name in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(name), theirs.get(name)
        ratio = _ratio(a, b)
        cells = [
            (a and a.relative_loss, "%.2e"),
            (b and b.relative_loss, "%.2e"),
            (ratio, "%.3g"),
            (a and a.seconds, "%.2f"),
            (b and b.seconds, "%.2f"),
            (_kib(a), "%.1f"),
            (_kib(b), "%.1f"),
        ]
        missing = "" if a and b else f"only in {'A' if a else 'B'}"
        notes = ", ".join(
            filter(None, (missing, *(f"{x}: {g.notes}" for x, g in (("A", a), ("B", b)) if g and g.notes)))
        )
        facts = [_Sided(g, k) for k, g in enumerate((a, b)) if g and (g.weights or g.measured)]
        change = math.inf if ratio is None else abs(math.log(ratio))
        rows.append({"name": name, "notes": notes, "cells": cells, "facts": facts, "change": change})
    return sorted(rows, key=lambda row: row["change"], reverse=True)


def _ratio(a: GroupFacts | None, b: GroupFacts | None) -> float | None:
    """The second loss over the first; None where one is not known or not positive."""
    losses = [g.relative_loss for g in (a, b) if g is not None and g.relative_loss is not None]
    good = len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    return losses[1] / losses[0] if good else None


# -- charts ----------------------------------------------------------------------------------------------------------


def _depth_charts(pages: Sequence[Contents]) -> tuple[list[Markup], int]:
    """A chart for each kind of layer, in the order of its worst loss; and the number of kinds without one."""
    kinds: dict[str, list[list[tuple[int, float]]]] = {}
    for k, page in enumerate(pages):
        for g in page.groups:
            loss = g.relative_loss
            if g.depth is not None and loss is not None and math.isfinite(loss) and loss > 0:
                kinds.setdefault(g.kind, [[] for _ in pages])[k].append((g.depth, loss))
    if not kinds:
        return [], 0
    worst = {kind: max(loss for points in series for _, loss in points) for kind, series in kinds.items()}
    limits = plots.loss_limits([loss for series in kinds.values() for points in series for _, loss in points])
    order = sorted(kinds, key=lambda kind: (-worst[kind], kind))
    charts = [
        Markup(plots.loss_by_depth(kind, [sorted(points) for points in kinds[kind]], limits))
        for kind in order[:MOST_KINDS]
    ]
    return charts, max(len(order) - MOST_KINDS, 0)


def _phase_chart(pages: Sequence[Contents]) -> tuple[Markup | None, str]:
    """Seconds by phase, or, where no phases were kept, seconds of solving by kind of layer."""
    tables = [dict(page.phases) for page in pages]
    title = "Seconds by phase of the run. A second counts for the innermost phase."
    if not all(tables):
        title, tables = "Seconds of solving, by kind of layer.", []
        for page in pages:
            seconds: dict[str, float] = {}
            for g in page.groups:
                seconds[g.kind] = seconds.get(g.kind, 0) + (g.seconds or 0)
            tables.append(seconds)
    least = max((sum(t.values()) for t in tables), default=0) / 500  # shorter bars would not be seen
    names = {name for table in tables for name, seconds in table.items() if seconds > least}
    names = sorted(names, key=lambda n: (-max(t.get(n, 0) for t in tables), n))[:MOST_KINDS]
    series = [[table.get(name, 0) for name in names] for table in tables]
    if not any(map(any, series)):
        return None, title
    return Markup(plots.bars(names, series, title, "seconds")), title


def _histogram(counts: list[tuple[float, int]], label: str) -> Markup:
    """Bars at equal steps: values of codes in their order, powers of two with the gaps between them."""
    values = [count for _, count in counts]
    if isinstance(counts[0][0], int):
        table = dict(counts)
        values = [table.get(k, 0) for k in range(counts[0][0], counts[-1][0] + 1)]
    return Markup(plots.small_bars(values, label))
