"""`wush-compile doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..errors import ConfigError
from .app import Device, app, console, device_named, one_line_errors, say

if TYPE_CHECKING:
    import torch


@app.command()
def doctor(
    device: Device = "auto",
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare and time every provider, minutes; needs a GPU.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where --deep writes its report.")] = Path("wush-doctor.json"),
    fuzz: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Instead, random calls of every op for so many minutes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --fuzz.")] = 0,
) -> None:
    """What runs where: versions, providers, native and emulated arithmetic, and a short self-test of every op."""
    from ..diagnostics.doctor import examine

    with one_line_errors():
        where = device_named(device)
        if deep and where.type != "cuda":
            raise ConfigError(f"--deep compares the kernels of a GPU; the device is {where.type}: leave --deep out")
        if fuzz is not None:
            if fuzz <= 0:
                raise ConfigError(f"--fuzz {fuzz}: give a number of minutes above 0")
            if not _fuzz(where, fuzz, seed):
                raise typer.Exit(1)
            return
        report = examine(where)
        capability = report["capability"]
        title = report["device"] + (
            "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
        )
        facts = Table("", title)
        facts.add_row(
            "versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
        )
        for name, state in report["providers"].items():
            facts.add_row(f"provider {name}", state)
        for format, words in report["arithmetic"].items():
            facts.add_row(format, words)
        console.print(facts)
        tests = Table("op", "asked in this order", "self-test", "seconds")
        for op, providers in report["ops"].items():
            checks = [check for check in report["self_test"] if check.op == op]
            bad = [f"{c.format} {c.case}: error {c.error:.2g}" for c in checks if not c.ok]
            tests.add_row(
                op,
                ", ".join(providers),
                "; ".join(bad) or f"{len(checks)} checks passed",
                f"{sum(c.seconds for c in checks):.1f}",
            )
        console.print(tests)
        good = all(check.ok for check in report["self_test"])
        if deep:
            good = _deep(where, report, out) and good
        if not good:
            raise typer.Exit(1)


def _deep(device: torch.device, report: dict, out: Path) -> bool:
    """The conformance of every provider and its times, as tables and in one file; whether all conforms."""
    from ..diagnostics import deep

    results, times = deep.run(device, report, out)
    table = Table("provider", "op", "format", "cases", "refused", "failed", "largest error")
    for row in deep.summary(results):
        table.add_row(*map(str, row))
    console.print(table)
    for result in results:
        if not result.ok:
            console.print(
                f"{result.provider} {result.op} {result.format} {result.case}: error {result.error:.2g}", markup=False
            )
    speed = Table("op", "format", "shape", "baseline µs", *dict.fromkeys(t.provider for t in times))
    for row in deep.side_by_side(times):
        speed.add_row(*row)
    console.print(speed)
    console.print(f"report: {out}", markup=False)
    return all(result.ok for result in results)


def _fuzz(device: torch.device, minutes: float, seed: int) -> bool:
    """Random calls for so many minutes, as a table; whether all conform."""
    from ..diagnostics import fuzz

    counts, failures, families = fuzz.run(device, minutes, seed)
    table = Table("provider", "op", "format", "checked", "refused", "failed")
    for provider, op, format in sorted({key[:3] for key in counts}):
        failed = sum((f.provider, f.op, f.format) == (provider, op, format) for f in failures)
        numbers = (counts[provider, op, format, kind] for kind in ("checked", "refused"))
        table.add_row(provider, op, format, *map(str, numbers), str(failed))
    console.print(table)
    for f in failures[:50]:
        say(f"family {f.index}: {f.provider} {f.op} {f.format} {f.words}: {f.error}")
    checked = sum(count for (*_, kind), count in counts.items() if kind == "checked")
    say(f"{checked} calls of {families} families of seed {seed}, {len(failures)} outside the contract")
    return not failures and checked > 0
