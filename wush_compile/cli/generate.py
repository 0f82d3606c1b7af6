"""`wush-compile generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import DataError
from .app import Checkpoint, Device, app, device_named, hide_bars, one_line_errors, say


@app.command()
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a quantized model (greedy)."""
    from ..checkpoint.source import load_model, load_tokenizer

    with one_line_errors():
        where = device_named(device)
        hide_bars()
        net, tokenizer = load_model(directory)
        tokenizer = tokenizer or load_tokenizer(directory)  # raises
        net.to(where)
        ids = tokenizer(prompt, return_tensors="pt").to(net.device)
        if ids["input_ids"].numel() == 0:
            raise DataError("--prompt is empty: give some text to go on from")
        out = net.generate(**ids, max_new_tokens=tokens, do_sample=False)
        say(tokenizer.decode(out[0], skip_special_tokens=True))
