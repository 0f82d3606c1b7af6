"""What the command line shows before torch is imported."""

import subprocess
import sys

from typer.testing import CliRunner

import wush_compile as wc
from wush_compile.cli import app


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_does_not_import_torch():
    # With torch it takes seconds; without, a quarter of one.
    code = """
import sys
sys.argv = ["wush-compile", "quantize", "--help"]
try:
    import wush_compile.cli
    wush_compile.cli.app()
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "transformers", "numpy"} & sys.modules.keys(), sorted(sys.modules)
"""
    assert "--calibration" in python(code)


def test_defaults_are_those_of_the_configuration():
    import inspect

    from wush_compile.cli.quantize import quantize
    from wush_compile.config import CONFIG_FIELDS, DEFAULT_IGNORE

    options = inspect.signature(quantize).parameters
    plain = wc.WushConfig()
    given = {name: options[name].default for name in CONFIG_FIELDS if name in options and name != "ignore"}
    assert given == {name: getattr(plain, name) for name in given}
    assert f"[default: ({', '.join(DEFAULT_IGNORE)})]" in " ".join(
        CliRunner().invoke(app, ["quantize", "--help"]).stdout.replace("│", " ").split()
    )
