"""The charts of a report as SVG text: matplotlib for the whole model, plain paths for the many small ones of a group.

Charts have no colours of their own: they name the page's CSS variables, so that one picture serves both themes.
"""

import functools
import io
import math
import re
from collections.abc import Sequence
from html import escape

from ..errors import WushError

# Matplotlib gets these colours, and the page's variables replace them in its output.
COLORS = {"#010203": "var(--text)", "#010204": "var(--first)", "#010205": "var(--second)", "#010206": "var(--line)"}
TEXT, FIRST, SECOND, LINE = COLORS
SERIES = ({"color": FIRST, "marker": "o", "ls": "-"}, {"color": SECOND, "marker": "s", "ls": "--", "mfc": "none"})
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wush",
    "text.parse_math": False,  # names may hold dollar signs
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "figure.facecolor": "none",
    "font.size": 9,
    "hatch.color": SECOND,
}


@functools.cache
def _matplotlib():
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise WushError("a report's charts need matplotlib: pip install 'wush-compile[report]'") from None
    return matplotlib, Figure


def _svg(draw, label: str, width: float = 4.2, height: float = 2.4) -> str:
    """The SVG element that `draw(axes)` makes; `label` says in words what it shows."""
    matplotlib, figure_class = _matplotlib()
    with matplotlib.rc_context(matplotlib.rcParamsDefault | SETTINGS):
        figure = figure_class(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for color, variable in COLORS.items():
        text = text.replace(color, variable)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    # A tenth of a point is enough for paths and places.
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), text)
    text = re.sub(r"\n\s*", "\n", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def loss_by_depth(kind: str, series: Sequence[Sequence[tuple[int, float]]], limits: tuple[float, float]) -> str:
    """Relative loss over the number of the layer, for one kind of layer: (depth, loss) of one or two reports."""

    def draw(axes) -> None:
        for points, style in zip(series, SERIES):
            several = len({depth for depth, _ in points}) < len(points)  # experts: dots without a line
            axes.plot(*zip(*points), lw=1.4, ms=4, **(style | {"ls": "none"} if several else style))
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(
            lambda x, _: f"{x:g}" if limits[1] < 12 * limits[0] and f"{x:e}"[0] in "25" else ""
        )
        axes.set_xlabel("layer")
        axes.set_title(kind if len(kind) <= 48 else f"{kind[:47]}…")
        axes.xaxis.get_major_locator().set_params(integer=True)

    values = [loss for points in series for _, loss in points]
    return _svg(draw, f"Relative loss of {kind} by layer, from {min(values):.2e} to {max(values):.2e}")


def bars(names: Sequence[str], series: Sequence[Sequence[float]], label: str, unit: str) -> str:
    """Horizontal bars with their values, of one or two reports; the second's are hatched."""

    def draw(axes) -> None:
        height = 0.8 / len(series)
        for k, values in enumerate(series):
            at = [i + (k - (len(series) - 1) / 2) * height for i in range(len(names))]
            style = {"color": FIRST} if k == 0 else {"fc": "none", "ec": SECOND, "hatch": "////"}
            drawn = axes.barh(at, values, height * 0.9, **style)
            axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3)
        axes.set_yticks(range(len(names)), [name if len(name) <= 28 else f"{name[:27]}…" for name in names])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(False)
        axes.set_xlabel(unit)

    return _svg(draw, label, 5.6, 0.7 + 0.26 * len(names) * max(1, 0.7 * len(series)))


def loss_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis for positive values, the same for all charts."""
    return min(values) / 1.5, max(values) * 1.5


# -- small charts of a group -----------------------------------------------------------------------------------------

WIDE, HIGH = 240, 72


def _open(label: str) -> str:
    return f'<svg class="small" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(label)}">'


def small_bars(values: Sequence[float], label: str) -> str:
    """Bars from left to right as one path; the highest one fills the height."""
    top, step = max([*values, 1e-30]), WIDE / max(len(values), 1)
    path = "".join(
        f"M{i * step:.1f} {HIGH}v{-max(value / top * HIGH, 0.5 if value else 0):.1f}h{step * 0.85:.1f}V{HIGH}"
        for i, value in enumerate(values)
    )
    return f'{_open(label)}<path class="bars" d="{path}"/></svg>'


def small_curves(curves: Sequence[Sequence[float]], label: str) -> str:
    """Curves over the same range on a logarithmic scale: the first solid, the second dashed."""
    logs = [[math.log(max(value, 1e-6)) for value in curve] for curve in curves]
    low, high = min(map(min, logs)), max(map(max, logs))
    paths = []
    for k, curve in enumerate(logs):
        step = WIDE / max(len(curve) - 1, 1)
        points = [
            f"{i * step:.1f} {3 + (high - value) / max(high - low, 1e-9) * (HIGH - 6):.1f}"
            for i, value in enumerate(curve)
        ]
        paths.append(f'<path class="curve{k}" d="M{"L".join(points)}"/>')
    return f"{_open(label)}{''.join(paths)}</svg>"
