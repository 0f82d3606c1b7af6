"""Kernels that `wush-compile tune` measured on this very GPU, in the user's cache. `choose` serves all other shapes.

The file is named after the device, the driver and Triton, which change what is fastest. WUSH_CACHE names another
folder.
"""

import ctypes
import functools
import json
import logging
import os
import re
from pathlib import Path

import torch
import triton

from .choose import Fused, Gemv, Hopper, has_gluon

logger = logging.getLogger("wush_compile")

KINDS = {kind.__name__: kind for kind in (Fused, Gemv, Hopper)}
GEMV_ROWS = (1, 2, 4)  # that `gemv` computes
Kernel = Fused | Gemv | Hopper | str
Table = dict[tuple[str, int, int], dict[int, Kernel]]  # (format, N, K) -> rows -> kernel


def driver_version() -> int:
    """The version of CUDA that the driver brings, such as 13000; 0 if it cannot be asked."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def path(device: int) -> Path:
    """Where the table of a CUDA device is, or will be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wush-compile"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    file = f"tuned-{name}-{driver_version()}-triton-{triton.__version__}.json"
    return Path(os.environ.get("WUSH_CACHE") or cache) / file


def dump(table: Table) -> str:
    """The table as JSON."""
    rows = [
        [*shape, rows, *([kernel] if isinstance(kernel, str) else [type(kernel).__name__, *kernel])]
        for shape, kernels in sorted(table.items())
        for rows, kernel in sorted(kernels.items())
    ]
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"


def parse(text: str) -> Table:
    """The table of `dump`'s text. ValueError, KeyError or TypeError for any other text."""
    table: Table = {}
    for format, n, k, rows, kind, *fields in json.loads(text):
        kernel = KINDS[kind](*fields) if fields else str(kind)
        table.setdefault((format, n, k), {})[int(rows)] = kernel
    return table


@functools.cache
def read(device: int) -> Table:
    """The table of a CUDA device; empty where there is none, or, with a warning, where it cannot be read."""
    try:
        where = path(device)
        return parse(where.read_text()) if where.exists() else {}
    except Exception as error:  # every product asks here: none may fail for it
        logger.warning("the table of tuned kernels cannot be read (%s): `wush-compile tune` writes it anew", error)
        return {}


def lookup(device: int, format: str, rows: int, n: int, k: int) -> Kernel | None:
    """The kernel measured for [rows, k] times [n, k], or for the next larger number of rows; None if there is none."""
    kernels = read(device).get((format, n, k))
    if kernels is None:
        return None
    for most in sorted(kernels):
        fits = not isinstance(kernels[most], Gemv) or rows in GEMV_ROWS and rows == most
        if most >= rows and fits:
            # Gluon may have failed since.
            return None if isinstance(kernels[most], Hopper) and not has_gluon() else kernels[most]
    return None
