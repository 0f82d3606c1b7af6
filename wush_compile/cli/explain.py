"""`wush-compile explain`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import Checkpoint, app, console, hide_bars, one_line_errors, say


@app.command()
def explain(
    directory: Checkpoint,
    all: Annotated[
        bool, typer.Option("--all", help="All groups, all names, and a layer's graph before and after.")
    ] = False,
    graph: Annotated[
        str | None, typer.Option(help="Only the graph of this layer inside torch.compile: layer.0")
    ] = None,
    after: Annotated[str | None, typer.Option(help="With --graph: the graph after this pass: fuse_norm")] = None,
) -> None:
    """What a checkpoint holds: settings, memory, what was skipped and why, and the ten worst groups."""
    from ..checkpoint.save_load import load
    from ..reporting.explain import explain as explanation
    from ..reporting.graphs import compiled_graph

    with one_line_errors():
        hide_bars()
        model = load(directory)
        if graph is None and after is None:
            text = explanation(model, all=all, width=console.width)
        else:
            layer = re.fullmatch(r"layer\.(\d+)", graph or "layer.0")
            if layer is None:
                raise ConfigError(f"--graph is layer.0, layer.1 and so on, not {graph!r}")
            text = compiled_graph(model, int(layer[1]), after)
        say(text)
