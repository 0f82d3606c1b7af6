"""`wush-compile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console, one_line_errors


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the quantized model is saved.")] = Path("out/smollm2-wush"),
    format: Annotated[str, typer.Option(help="mxfp4, nvfp4 or int4.")] = "mxfp4",
) -> None:
    """Quantize SmolLM2-135M-Instruct on this CPU and compare four ways to do it (some minutes, one download)."""
    from ..demo.run import demo as run

    with one_line_errors():
        run(out, format, console)
