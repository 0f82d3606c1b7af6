"""The demonstration: quantizes a real language model to W4A4 on a CPU, measures it and saves it."""

import copy
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..calibration.run import quantize
from ..checkpoint.save_load import save
from ..config import WushConfig
from ..data import python_topics, windows
from ..evaluation.language import compare
from ..modules import WushLinear
from ..reporting.contents import write_evaluation
from ..reporting.page import report
from ..reporting.summary import quantized_bytes
from . import smollm2

WINDOW = 512
CALIBRATION_WINDOWS = 24
EVALUATION_WINDOWS = 8
PROMPT = "The three most important things about programming languages are"
ROWS = (
    ("RTN identity", dict(solver="rtn", transform="identity", weight_scale_rule="absmax")),
    ("RTN Hadamard", dict(solver="rtn", transform="hadamard", weight_scale_rule="absmax")),
    ("GPTQ WUSH", {}),
)


def _generate(model: nn.Module, tokenizer, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _rows(reference: nn.Module, calibration: list, text: torch.Tensor, format: str) -> Iterator[tuple]:
    """(name, comparison, seconds of quantization, model) of each row. One quantized model is in memory at a time."""
    for name, settings in ROWS:
        config = WushConfig(format=format, **settings)
        model = copy.deepcopy(reference)
        start = time.perf_counter()
        quantize(model, calibration if config.needs_data else None, config)
        seconds = time.perf_counter() - start
        yield name, compare(reference, model, text, window=WINDOW), seconds, model


def demo(out: Path, format: str = "mxfp4", console: Console | None = None) -> nn.Module:
    """Runs the demonstration. Saves the model of the last row in `out`, and returns it."""
    console = console or Console()
    console.print("SmolLM2-135M-Instruct, calibrated and evaluated on different parts of Python's own documentation")
    model, tokenizer = smollm2.load()
    pieces = windows(python_topics(), tokenizer, WINDOW, CALIBRATION_WINDOWS + EVALUATION_WINDOWS)
    calibration = list(torch.cat(pieces[:CALIBRATION_WINDOWS]).split(4))
    text = torch.cat(pieces[CALIBRATION_WINDOWS:]).flatten()

    table = Table(title=f"{format} weights and activations in all decoder linears, {text.numel()} tokens")
    for heading in ("", "perplexity", "KL to bf16", "top-1", "weights", "seconds"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, measured, seconds, quantized in _rows(model, calibration, text, format):
        if not table.rows:
            names = [n for n, m in quantized.named_modules() if isinstance(m, WushLinear)]
            plain = sum(p.numel() * p.element_size() for n in names for p in model.get_submodule(n).parameters())
            table.add_row("bf16", f"{measured.reference_perplexity:.2f}", "", "", f"{plain / 2**20:.1f} MiB", "")
        table.add_row(
            name,
            f"{measured.perplexity:.2f}",
            f"{measured.kl:.4f}",
            f"{100 * measured.top1:.1f} %",
            f"{quantized_bytes(quantized) / 2**20:.1f} MiB",
            f"{seconds:.0f}",
        )
    console.print(table)
    console.print(f"[bold]{ROWS[-1][0]} goes on:[/bold] {_generate(quantized, tokenizer, PROMPT, 24)}", soft_wrap=True)
    save(quantized, out, tokenizer=tokenizer)
    write_evaluation(out, {"text": "Python's documentation", "window": WINDOW, **measured.to_dict()})
    told = ""
    if importlib.util.find_spec("matplotlib") is not None:
        page = out.with_name(f"{out.name}.html")
        page.write_text(report(out), encoding="utf-8")
        told = f"\n\nA report to open in a browser: {page}"
    console.print(
        f"\nSaved in {out}. Load it with\n\n    import wush_compile as wc\n    model = wc.load({str(out)!r})\n\n"
        f"or from the shell (the commands are in .venv/bin after make demo): wush-compile generate {out} "
        f"--prompt '...'; wush-compile explain {out}{told}",
        soft_wrap=True,
    )
    return quantized
