"""`wush-compile tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from .app import Device, app, console, device_named, hide_bars, one_line_errors, say


@app.command()
def tune(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint; without one, the sizes of Llama-3.1-8B.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Numbers of rows, instead of 1 to 256.")] = None,
    device: Device = "auto",
) -> None:
    """Times the products of a checkpoint's sizes on this GPU, a minute or two, and keeps the fastest kernels for it."""
    import torch

    from ..diagnostics import tune as tuning

    with one_line_errors():
        where = device_named(device)
        if where.type != "cuda":
            raise ConfigError(f"tune times the kernels of a GPU; the device is {where.type}")
        if any(m < 1 for m in rows or ()):
            raise ConfigError(f"--rows {min(rows)}: a product has at least one row")
        index = torch.cuda.current_device() if where.index is None else where.index
        if directory is None:
            sizes = [(format, *size) for format in ("mxfp4", "nvfp4") for size in tuning.LLAMA_8B]
        else:
            from ..checkpoint.save_load import load

            hide_bars()
            sizes = tuning.sizes_of(load(directory))
        from ..kernels.triton.linear import tuned

        with torch.cuda.device(index), torch.inference_mode():
            _, lines = tuning.tune(index, sizes, sorted(set(rows or tuning.ROWS)))
        table = Table("format", "rows", "N", "K", "tables µs", "fastest µs", "kernel")
        for *shape, before, after, kernel in lines:
            table.add_row(*map(str, shape), "" if before is None else f"{before:.1f}", f"{after:.1f}", kernel)
        console.print(table)
        say(f"kept in {tuned.path(index)}")
