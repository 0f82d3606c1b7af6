"""The compiled libraries of csrc/: where they are, and how they are loaded.

A wheel or a checkout may hold any of them, or none: `libwush_sm_90a.so` for a GPU architecture, `libwush_cpu.so`.
"""

import ctypes
import functools
import hashlib
from pathlib import Path
from types import ModuleType

import torch

# Where libraries are: in an installed package, and in a checkout.
DIRECTORIES = (Path(__file__).parent / "lib", Path(__file__).resolve().parents[2] / "build" / "csrc")
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


def digest(target: str) -> str:
    """SHA-256 of a checkout's sources of a target. `csrc/build.py` writes it beside the library, `.sources`."""
    folder = SOURCES / "cpu" if target == "cpu" else SOURCES
    files = sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".cu", ".cuh", ".h"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def libraries() -> dict[str, Path]:
    """Target ("sm_90a", "cpu") -> path of its library, for the targets that are built."""
    found = {}
    for directory in DIRECTORIES:
        for path in sorted(directory.glob("libwush_*.so")):
            found.setdefault(path.stem.removeprefix("libwush_"), path)
    return found


@functools.cache
def load(target: str) -> ModuleType:
    """The ops of a target's library, `torch.ops.wush_<target>`; OSError or RuntimeError if it does not run here."""
    path = libraries()[target]
    built = path.with_suffix(".sources")
    # A checkout moves on without its library, whose arguments then mean something else.
    if built.exists() and SOURCES.is_dir() and built.read_text() != digest(target):
        raise RuntimeError(f"csrc has changed since: build it again by `python csrc/build.py --targets {target}`")
    torch.ops.load_library(str(path))
    problem = ctypes.CDLL(str(path)).wush_problem
    problem.restype = ctypes.c_char_p
    sentence = problem()
    if sentence:
        raise RuntimeError(sentence.decode())
    return getattr(torch.ops, f"wush_{target}")
