"""The command line: `wush-compile`, also `python -m wush_compile`. Every command's --help is enough to use it.

A command imports what it needs when it runs, so that --help does not wait for torch.

app.py    the program, what commands share, and errors in one line
others    a command each
"""

# In the order of --help. Each registers its commands.
from . import demo, quantize, evaluate, explain, report, generate, serve, doctor, tune  # noqa: F401, I001
from .app import app as app
