"""The tables of `choose.py`: their choices are pinned, and agree with the kept tuning run."""

import hashlib
import importlib
import itertools
import pathlib
import sys

import pytest

pytest.importorskip("triton")
from wush_compile.kernels.triton.linear import choose as tiles

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1536, 576), (128, 576), (4096, 640), (8200, 8192))
ROWS = (*range(1, 70), 96, 128, 129, 192, 256, 300, 384, 511, 512, 768, 1000, 1024, 1536, 2048, 4096, 8192)
OPTIONS = ({}, {"precise": True}, {"portable": True}, {"library": False})


@pytest.mark.skipif(not tiles.has_gluon(), reason="this Triton has no Gluon, so it chooses other tiles")
def test_choices_are_pinned():
    """A change of a table or a rule shows here. If it is meant, replace the digest; fit_tiles.py should say why."""
    lines = []
    for format, (n, k), rows in itertools.product(("mxfp4", "nvfp4", "int4"), SHAPES, ROWS):
        for capability, options in itertools.product(((9, 0), (8, 0), (8, 9), (10, 0)), OPTIONS):
            kernel = tiles.choose(format, rows, n, k, capability, **options)
            lines.append(kernel if isinstance(kernel, str) else f"{type(kernel).__name__}{tuple(kernel)}")
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "d27f498aa2c72511"


@pytest.fixture
def fit_tiles(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module("fit_tiles")
    for name in {"fit_tiles", "common"} - before:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_figures_are_those_of_the_kept_run(fit_tiles, format):
    """The steps within 2 %, MXFP4's library within 7 %; choose.py says which figures the run does not give."""
    measured = fit_tiles.read_tuning(fit_tiles.KEPT)
    fitted, error = fit_tiles.fit({key: all for key, all in measured.items() if key[0] == format})
    assert error.mean() < 0.03
    written = fit_tiles.in_file(format)
    steps = [name for name in written if name.startswith("step")]
    assert [name for name in steps if name not in fitted] == (
        ["step of (256, 32, 4, 1, 7)"] if format == "nvfp4" else []
    )
    for name in steps:
        assert name not in fitted or written[name] == pytest.approx(fitted[name], rel=0.02), name
    if format == "mxfp4":
        for name in ("LIBRARY.weight", "LIBRARY.product"):
            assert written[name] == pytest.approx(fitted[name], rel=0.07), name


def test_chosen_kernels_are_near_the_fastest_measured(fit_tiles):
    """Each within 5 % above 64 rows; choose.py says how far off NVFP4 is at 64."""
    ratios = fit_tiles.slower(fit_tiles.read_tuning(fit_tiles.KEPT))
    assert max(ratio for key, ratio in ratios.items() if key[1] > 64) < 1.05
    assert sum(ratios.values()) / len(ratios) < 1.01
