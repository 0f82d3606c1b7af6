"""`wush-compile generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import DataError
from .app import Checkpoint, Device, app, device_named, one_line_errors, say


@app.command()
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 64,
    device: Device = "auto",
) -> None:
    """Continue a prompt with a quantized model (greedy)."""
    from ..checkpoint.save_load import load_model

    with one_line_errors():
        net, tokenizer = load_model(str(directory))
        net.to(device_named(device))
        ids = tokenizer(prompt, return_tensors="pt").to(net.device)
        if ids["input_ids"].numel() == 0:
            raise DataError("--prompt is empty: give some text to go on from")
        out = net.generate(**ids, max_new_tokens=tokens, do_sample=False)
        say(tokenizer.decode(out[0], skip_special_tokens=True))
