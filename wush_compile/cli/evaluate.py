"""`wush-compile evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import Device, Model, app, console, device_named, one_line_errors, read_text


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file.")],
    reference: Annotated[str | None, typer.Option(help="Model to measure KL and top-1 agreement against.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first windows.")] = None,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in the checkpoint MODEL, for report.")] = False,
) -> None:
    """Perplexity of MODEL on a text; with --reference also KL divergence and top-1 agreement."""
    from ..checkpoint.files import read_config
    from ..checkpoint.save_load import load_model
    from ..data import tokenize
    from ..evaluation import language as evaluation
    from ..reporting.contents import write_evaluation

    with one_line_errors():
        if save:
            read_config(Path(model))  # before minutes of work
        contents = read_text(text)
        net, tokenizer = load_model(model)
        net.to(device_named(device))
        ids = tokenize(contents, tokenizer, special=False)
        ids = ids if count is None else ids[: count * window]
        table = Table("", "perplexity", *(["KL to reference", "top-1 agreement"] if reference else []))
        if reference is None:
            result = {"perplexity": evaluation.perplexity(net, ids, window)}
            table.add_row(model, f"{result['perplexity']:.3f}")
        else:
            other, _ = load_model(reference)
            measured = evaluation.compare(other.to(device_named(device)), net, ids, window)
            result = measured.to_dict()
            table.add_row(reference, f"{measured.reference_perplexity:.3f}", "", "")
            table.add_row(model, f"{measured.perplexity:.3f}", f"{measured.kl:.4f}", f"{100 * measured.top1:.1f} %")
        console.print(table)
        if save:
            write_evaluation(Path(model), {"text": text.name, "window": window, **result})
