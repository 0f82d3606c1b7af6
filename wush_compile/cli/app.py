"""The program, and what its commands share: the kinds of arguments, devices, text files, and errors in one line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from .. import __version__
from ..errors import ConfigError, DataError, WushError

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Accurate 4-bit inference of PyTorch models: weights and activations in MXFP4, NVFP4 or INT4 with WUSH.",
)
console = Console()

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local directory, a hub name, or a GGUF file.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by wush-compile.")]
Bos = Annotated[
    bool, typer.Option(help="Whether windows have the tokens that the tokenizer puts around a text, such as BOS.")
]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wush-compile {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, not only warnings.")] = False,
):
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(
        level=level, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))], force=True
    )


@contextlib.contextmanager
def one_line_errors(interrupted: str = "interrupted: nothing was written") -> Iterator[None]:
    """Errors that the user can mend are one line and exit code 1, without a traceback."""
    try:
        yield
    except (WushError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise typer.Exit(130) from None


def hide_bars(quiet: bool = False) -> None:
    """Hides transformers' bars if the user wants none, or if they would not be drawn on a terminal."""
    import transformers

    if quiet or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def say(text: str) -> None:
    """Prints text as it is: no markup, no colour, no line broken."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def device_named(name: str) -> torch.device:
    """The device of `--device`. Raises `ConfigError` for one that this machine does not have."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":  # without a context: each process of torchrun has a GPU of its own
            here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        else:
            here = torch.empty(1, device=device).cpu().numel() == 1  # raises on the meta device too
    except (RuntimeError, AssertionError, NotImplementedError):
        here = False
    if not here:
        found = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ConfigError(f"--device {name}: this machine has {found}; auto takes a GPU if there is one")
    return device


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises `DataError` for any other file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start}): give a text file") from None
