"""`wush-compile evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .app import Bos, Device, Model, app, console, device_named, hide_bars, one_line_errors, read_text, say


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text file.")],
    reference: Annotated[str | None, typer.Option(help="Model to measure KL and top-1 agreement against.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first windows.")] = None,
    bos: Bos = True,
    device: Device = "auto",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in the checkpoint MODEL, for report.")] = False,
) -> None:
    """Perplexity of MODEL on a text; with --reference also KL divergence and top-1 agreement."""
    from ..checkpoint.files import read_config
    from ..checkpoint.source import load_model, load_tokenizer
    from ..data import special_tokens, tokenize
    from ..evaluation import language as evaluation
    from ..reporting.contents import write_evaluation

    with one_line_errors():
        if save:
            read_config(Path(model))  # before minutes of work
        contents, where = read_text(text), device_named(device)
        hide_bars()
        net, tokenizer = load_model(model)
        tokenizer = tokenizer or load_tokenizer(model)  # raises
        net.to(where)
        ids = tokenize(contents, tokenizer, special=False)
        prefix = special_tokens(tokenizer)[0] if bos else []
        ids = ids if count is None else ids[: count * (window - len(prefix))]
        table = Table("", "perplexity", *(["KL to reference", "top-1 agreement"] if reference else []))
        if reference is None:
            result = {"perplexity": evaluation.perplexity(net, ids, window, prefix=prefix)}
            table.add_row(model, f"{result['perplexity']:.3f}")
        else:
            other, _ = load_model(reference)
            measured = evaluation.compare(other.to(where), net, ids, window, prefix=prefix)
            result = measured.to_dict()
            table.add_row(reference, f"{measured.reference_perplexity:.3f}", "", "")
            table.add_row(model, f"{measured.perplexity:.3f}", f"{measured.kl:.4f}", f"{100 * measured.top1:.1f} %")
        console.print(table)
        own = min(len(ids), window - len(prefix))
        windows, begins = len(ids) // own, tokenizer.convert_ids_to_tokens(prefix)
        say(
            f"{windows} windows of {own + len(prefix)} tokens, {windows * own} of the text's; "
            + (f"each begins with {' '.join(begins)}" if prefix else "no BOS")
        )
        if save:
            facts = {"text": text.name, "window": window, "windows": windows, "tokens": windows * own, "prefix": prefix}
            write_evaluation(Path(model), {**facts, **result})
