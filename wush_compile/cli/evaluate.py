"""`wush-compile evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from .app import Bos, Device, Model, app, console, device_named, hide_bars, one_line_errors, read_text, say
from .evaluate_tasks import evaluate_tasks


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file: perplexity.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, or presets, with commas between: paper-llama, winogrande ...")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model to compare with: KL and top-1 agreement, or recovery on tasks.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 2048,
    count: Annotated[int | None, typer.Option(min=1, help="Only the first windows.")] = None,
    bos: Bos = True,
    device: Device = "auto",
    task_dir: Annotated[Path | None, typer.Option(help="Folder of YAML files of tasks.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples before each item; the task's own number.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask tasks as a chat, by the tokenizer's template.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first items of each task.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests in one forward. Default: what fits; 8 on a CPU.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of task results; the same command goes on from it.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep the result in the checkpoint MODEL, for report.")] = False,
) -> None:
    """Perplexity of MODEL on a text, or its scores on tasks; with --reference also what quantization cost."""
    from ..checkpoint.files import read_config
    from ..checkpoint.source import load_model, load_tokenizer
    from ..data import special_tokens, tokenize
    from ..evaluation import language as evaluation
    from ..reporting.contents import write_evaluation

    with one_line_errors("interrupted: finished tasks are in --out" if out else "interrupted: nothing was written"):
        if (text is None) == (tasks is None):
            raise ConfigError("give either --text FILE or --tasks NAMES")
        if tasks is not None:
            if save:
                raise ConfigError("--save is for --text: --out keeps the results of tasks")
            names = [name.strip() for name in tasks.split(",") if name.strip()]
            evaluate_tasks(model, reference, names, task_dir, shots, chat, limit, batch, out, device)
            return
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
