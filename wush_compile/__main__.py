"""`python -m wush_compile` is the command line."""

from .cli import app

app()
