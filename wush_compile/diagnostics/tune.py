"""`wush-compile tune`: times the products of a model's sizes on this GPU, and keeps each size's fastest kernel.

The candidates are the tiles of `linear/choose.py`'s tables, with other numbers of parts of K, and, on Hopper, the tiles
that its formula holds for the fastest. Products are compiled side by side, then timed one after the other with weights
outside the L2 cache. `linear/tuned.py` says where the result is kept and when it is taken.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Iterable

import torch
from tqdm import tqdm

from ..errors import ConfigError
from ..formats import FORMATS
from .timing import copies, time_us

# (N, K) of the linear groups of a Llama-3.1-8B decoder layer.
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROCESSES = 12  # that compile at a time
MOST_HOPPER = 6  # tiles of Hopper's product for one size
Job = tuple[str, int, int, int, object]  # format, rows, N, K, kernel


def sizes_of(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    """(format, N, K) of the quantized linear groups of a model, once each. `ConfigError` if it has none to tune."""
    from ..modules import WushGroup

    groups = [m for m in model.modules() if isinstance(m, WushGroup)]
    packed = [(g.format, *g.weight_packed.shape) for g in groups if g.format in ("mxfp4", "nvfp4")]
    found = sorted({(format, n, 2 * half) for format, n, half in packed})
    if not found:
        raise ConfigError("the checkpoint has no linear in mxfp4 or nvfp4: there is nothing to tune")
    return found


def candidates(format: str, rows: int, n: int, k: int, capability: tuple[int, int], processors: int) -> list:
    """Kernels worth timing, the one that the tables name first."""
    from ..kernels.triton.linear import choose as tables

    chosen = tables.choose(format, rows, n, k, capability, multiprocessors=processors)
    found = [chosen]
    if rows in (1, 2, 4):
        found += tables.GEMV[format, rows]
    if k % 128 == 0 and (capability >= (9, 0) or format == "nvfp4") and capability < (10, 0):
        for tile in next((tiles for most, tiles in tables.FUSED[format].items() if rows <= most), ()):
            block_k = tile.block_k if k % tile.block_k == 0 else 128
            parts = (s for s in (1, 2, 4, 8) if k // block_k % s == 0)
            found += [tile._replace(block_k=block_k, split_k=s) for s in parts]
    if capability == (9, 0) and k % 128 == 0 and rows > 4 and tables.has_gluon():
        times = tables.hopper_times(format, rows, n, k, processors)
        found += sorted(times, key=times.get)[:MOST_HOPPER]
    if rows >= 256:
        found.append(tables.LIBRARY[format].name)
    return list(dict.fromkeys(found))


def _operands(format: str, rows: int, n: int, k: int, count: int) -> tuple[tuple, list[tuple]]:
    """(quantized rows, `count` weights) of random bytes."""

    def packed(m: int) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (115, 122) if format == "mxfp4" else (40, 60)
        codes = torch.randint(0, 256, (m, k // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.randint(low, high, (m, k // FORMATS[format].group_size), dtype=torch.uint8, device="cuda")

    return packed(rows), [packed(n) for _ in range(count)]


def _calls(job: Job, count: int) -> list:
    from ..kernels.triton.linear.fp4_linear import fp4_linear

    format, rows, n, k, kernel = job
    x, weights = _operands(format, rows, n, k, count)
    g = torch.ones(1, device="cuda") if format == "nvfp4" else None
    return [lambda w=w: fp4_linear(*x, g, *w, g, None, None, format, torch.bfloat16, kernel) for w in weights]


def compiled(job: Job) -> bool:
    """Runs a candidate in this process, which puts its kernels into Triton's cache. False if it cannot run."""
    try:
        (call,) = _calls(job, 1)
        call(), call()  # a weight's second use may be compiled otherwise
        torch.cuda.synchronize()
    except Exception:  # a candidate that does not run is left out
        return False
    return True


def compile_all(jobs: list[Job]) -> list[Job]:
    """Those of the jobs whose kernel compiles and runs; each in one of several processes."""
    parts = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    with concurrent.futures.ProcessPoolExecutor(parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = list(tqdm(pool.map(compiled, jobs), desc="compiling", unit="kernel", total=len(jobs)))
    return [job for job, ok in zip(jobs, done, strict=True) if ok]


def microseconds(job: Job) -> float:
    """Time of a product, weights outside the L2 cache."""
    format, _, n, k, _ = job
    return time_us(_calls(job, copies(0.53 * n * k, 16)), 5)


def tune(
    device: int,
    sizes: Iterable[tuple[str, int, int]],
    rows: Iterable[int] = ROWS,
    compile=compile_all,
    time=microseconds,
) -> tuple[dict, list[tuple]]:
    """Measures, and adds the winners to the device's table.

    (the table as `tuned.Table`, lines of (format, rows, N, K, µs of the tables' kernel or None, µs of the fastest, its
    repr))."""
    from ..kernels.triton.common.memory import multiprocessors
    from ..kernels.triton.linear import tuned
    from ..kernels.triton.linear.fp4_linear import capability

    jobs = [
        (format, m, n, k, kernel)
        for (format, n, k), m in itertools.product(sizes, rows)
        for kernel in candidates(format, m, n, k, capability(device), multiprocessors(device))
    ]
    table = {shape: dict(kernels) for shape, kernels in tuned.read(device).items()}
    lines, running = [], compile(jobs)
    bar = tqdm(total=len(running), desc="timing", unit="kernel")
    for (format, m, n, k), group in itertools.groupby(running, key=lambda job: job[:4]):
        times = {}
        for job in group:
            times[job[4]] = time(job)
            bar.update()
        best = min(times, key=times.get)
        first = next(j[4] for j in jobs if j[:4] == (format, m, n, k))
        table.setdefault((format, n, k), {})[m] = best
        lines.append((format, m, n, k, times.get(first), times[best], repr(best)))
    bar.close()
    where = tuned.path(device)
    where.parent.mkdir(parents=True, exist_ok=True)
    partial = where.with_suffix(".partial")
    partial.write_text(tuned.dump(table))
    os.replace(partial, where)
    tuned.read.cache_clear()
    return table, lines
