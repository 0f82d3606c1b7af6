"""`python -m wush_compile` runs the command line."""

from .cli import app

app()
