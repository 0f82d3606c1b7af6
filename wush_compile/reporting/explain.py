"""`explain`: what was quantized, how well, and what was left alone; on request the graphs too."""

from torch import nn

from ..checkpoint.record import quantization_of
from ..errors import WushError, one_of
from .graphs import captured_graphs, compiled_graph
from .summary import summary
from .table import group_table, worst_first

WORST = 10
VIEWS = {"captured": captured_graphs, "compiled": compiled_graph}


def explain(model: nn.Module, view: str | None = None, *, all: bool = False, width: int = 120) -> str:
    """What `quantize` did, on one screen: settings, memory, what was skipped and why, and the ten worst groups.

    view
        Adds the graph of the first layer: as `captured` before and after quantization, or as `compiled` by
        `torch.compile(backend="wush")`, before and after its passes.
    all
        Every group, every setting, the name of every module that was skipped, and the captured graph (or `view`).
    width
        Columns of the text.

    Raises `WushError` for a model that is not quantized, `ConfigError` for an unknown view. Where a graph cannot be
    traced, its place says why.
    """
    if view is not None:
        one_of("view", view, VIEWS)
    text = [summary(model, all, width), _groups(model, None if all else WORST, width)]
    view = "captured" if all and view is None else view
    if view is None:
        text.append(
            'all=True (--all) shows every group, every name and the graph of a layer; view="compiled" '
            "(--graph layer.0) shows\nthe graph inside torch.compile."
        )
    else:
        try:
            text.append(VIEWS[view](model))
        except WushError as error:
            text.append(f"(no graph: {error})")
    return "\n\n".join(text)


def _groups(model: nn.Module, limit: int | None, width: int) -> str:
    """The table of groups and a line that says which groups these are."""
    count, report = len(worst_first(model)), quantization_of(model).report
    which = f"{limit} of {count} groups" if limit is not None and limit < count else f"{count} groups"
    order = (
        "largest relative loss first"
        if any("relative_loss" in entry for entry in report.values())
        else "in the model's order; their losses are not known"
    )
    return f"{which}, {order}\n{group_table(model, limit, width)}"
