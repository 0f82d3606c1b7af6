"""The compiled libraries of csrc/: where they are, and how they are loaded.

A wheel or a checkout may hold any of them, or none: `libwush_sm_90a.so` for a GPU architecture, `libwush_cpu.so`.
"""

import ctypes
import functools
from pathlib import Path
from types import ModuleType

import torch

# Where libraries are: in an installed package, and in a checkout.
DIRECTORIES = (Path(__file__).parent / "lib", Path(__file__).resolve().parents[2] / "build" / "csrc")


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
    torch.ops.load_library(str(path))
    problem = ctypes.CDLL(str(path)).wush_problem
    problem.restype = ctypes.c_char_p
    sentence = problem()
    if sentence:
        raise RuntimeError(sentence.decode())
    return getattr(torch.ops, f"wush_{target}")
