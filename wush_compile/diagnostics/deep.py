"""`wush-compile doctor --deep`: conformance and times of every provider of a GPU, in one report that can be sent."""

import concurrent.futures
import datetime
import itertools
import json
import logging
import multiprocessing
import os
from pathlib import Path

import torch
from tqdm import tqdm

from .conformance import Result, conformance
from .timing import Plan, Time, benchmark, machine, run_once

logger = logging.getLogger("wush_compile")

# Number of processes that compile kernels at a time. Each takes a core and a few hundred MiB of GPU memory.
PROCESSES = 12


def _compile_part(device: str, part: int, parts: int) -> None:
    """Runs every `parts`-th case once to fill Triton's cache. Failures are reported in the real run."""

    def mine(index: int) -> bool:
        return index % parts == part

    where = torch.device(device)
    for _ in conformance(where, mine):
        pass
    for _ in benchmark(where, Plan(run_once, lambda nbytes: 1, mine)):
        pass


def compile_all(device: torch.device) -> None:
    """Compiles the kernels of the conformance suite and the benchmark in parallel: this takes most of their time."""
    parts = max(1, min(PROCESSES, (os.cpu_count() or 1) - 1))
    with concurrent.futures.ProcessPoolExecutor(parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_part, str(device), part, parts) for part in range(parts)]
        for job in tqdm(concurrent.futures.as_completed(jobs), desc="compiling", unit="process", total=parts):
            if job.exception():
                logger.warning(
                    "compiling kernels in parallel failed (%s): each is compiled when it is first used", job.exception()
                )


def run(device: torch.device, report: dict, out: Path) -> tuple[list[Result], list[Time]]:
    """Runs conformance and times, and writes them to `out` (JSON) with `report`, the result of `doctor.examine`.

    The file is written after the conformance and again with the times, so that a crash of a kernel loses little.
    """
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results, times = [], []
    compile_all(device)

    def write() -> None:
        out.write_text(
            json.dumps(
                {
                    "started": started,
                    "machine": machine(),
                    **report,
                    "self_test": [check._asdict() for check in report["self_test"]],
                    "conformance": [r._asdict() for r in results],
                    "times": [t._asdict() for t in times],
                },
                indent=1,
                default=str,
            )
        )

    for result in tqdm(conformance(device), desc="conformance", unit="case"):
        results.append(result)
    write()
    with torch.inference_mode():
        for time in tqdm(benchmark(device), desc="times", unit="case"):
            times.append(time)
    write()
    return results, times


def summary(results: list[Result]) -> list[tuple]:
    """(provider, op, format, cases, refused, failed, largest error) of each provider, op and format."""
    rows = []
    key = lambda r: (r.provider, r.op, r.format)  # noqa: E731
    for group, members in itertools.groupby(sorted(results, key=key), key=key):
        members = list(members)
        errors = [r.error for r in members if r.error is not None]
        rows.append(
            (
                *group,
                len(members),
                sum(r.refused is not None for r in members),
                sum(not r.ok for r in members),
                f"{max(errors):.2g}" if errors else "",
            )
        )
    return rows


def side_by_side(times: list[Time]) -> list[list[str]]:
    """A row for each op, format and shape: the baseline, then each provider's microseconds and speed against it."""
    providers = list(dict.fromkeys(t.provider for t in times))
    rows = {}
    for t in times:
        case = [t.op, t.format, t.shape, f"{t.baseline:.1f}"]
        row = rows.setdefault(tuple(case[:3]), case + [""] * len(providers))
        words = t.note if t.microseconds is None else f"{t.microseconds:.1f} ({t.baseline / t.microseconds:.2f}x)"
        row[4 + providers.index(t.provider)] = words
    return list(rows.values())
