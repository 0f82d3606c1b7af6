"""`wush-compile report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app, one_line_errors, say


@app.command()
def report(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A checkpoint; with --follow: the last run's, to compare with."),
    ] = None,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second checkpoint, side by side.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page. Default: report.html.")] = None,
    follow: Annotated[Path | None, typer.Option(help="Show a run that goes on, by the file of quantize --log.")] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of --follow without --out, on 127.0.0.1; 0: a free one.")
    ] = 0,
    once: Annotated[bool, typer.Option("--once", help="With --follow and --out: write the page one time.")] = False,
) -> None:
    """Write a page (HTML, one file) about a checkpoint, about two of them, or about a run that goes on."""
    from ..reporting import follow as following
    from ..reporting.page import report as html_report

    with one_line_errors("stopped"):
        if follow is not None:
            if other is not None:
                raise ConfigError("--follow compares with one checkpoint: leave the second one out")
            if out is not None:
                following.rewrite(follow, out, directory, once)
                say(f"written to {out}")
                return
            if once:
                raise ConfigError("--once writes one page: say where with --out")
            with following.serving(follow, directory, port) as server:
                say(f"http://127.0.0.1:{server.server_port}/ shows {follow}; Ctrl-C ends it")
                server.serve_forever()
        if directory is None:
            raise ConfigError("give the directory of a checkpoint, or --follow FILE")
        out = out or Path("report.html")
        following.write_page(out, html_report(directory, other))
        say(f"written to {out}")
