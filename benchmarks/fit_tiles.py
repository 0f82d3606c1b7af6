"""Fits or checks the figures of `kernels/triton/linear/choose.py` against what `kernel_speed.py tune-linear` measured.

    python benchmarks/fit_tiles.py [results/tune_linear_h100.json]

Fitted: HOPPER, TILE_US, HANDOVER_US, HANDOVER_US_PER_VALUE and LIBRARY, by least squares of relative errors. A measured
time is taken to be the formula's plus a time that all candidates of a shape share, the activation's. TILE_US and the
handover have one value for both formats, so the file holds a rounded compromise.

Checked: FUSED, LEAST_ROWS and LIBRARY_ROWS, by comparing what they choose with the fastest candidate. One line lists
what the run did not measure. The last lines say how much slower the chosen kernels are than the fastest.
"""

import pathlib
import sys

import torch
from common import read_tuning

from wush_compile.kernels.triton.linear import choose as tiles
from wush_compile.kernels.triton.linear.choose import MULTIPROCESSORS, Fused, Hopper

Key = tuple[str, int, int, int]  # format, rows, N, K
KEPT = pathlib.Path(__file__).parent / "results" / "tune_linear_h100.json"
FORMATS = ("mxfp4", "nvfp4")


def terms(key: Key, kernel: Hopper | str) -> dict[str, float]:
    """The formula of a candidate's microseconds as {figure: its coefficient}."""
    _, rows, n, k = key
    if isinstance(kernel, str):
        return {"LIBRARY.launch": 1, "LIBRARY.weight": n * k, "LIBRARY.product": rows * n * k}
    steps, step = k // 128, f"step of {tuple(kernel._replace(split_k=1))}"
    waves, tail = divmod(-(-n // kernel.block_n) * -(-rows // kernel.block_m), MULTIPROCESSORS)
    if kernel.split_k == 1 or not tail:
        waves += tail > 0
        return {"TILE_US": waves, step: waves * steps}
    parts, values = -(-tail * kernel.split_k // MULTIPROCESSORS), kernel.block_n * kernel.block_m
    return {
        "TILE_US": waves + parts,
        step: waves * steps + parts * -(-steps // kernel.split_k),
        "HANDOVER_US": kernel.split_k - 1,
        "HANDOVER_US_PER_VALUE": (kernel.split_k - 1) * values,
    }


def in_file(format: str) -> dict[str, float]:
    """The figures of `choose.py` under the names of `terms`."""
    library = tiles.LIBRARY[format]
    return {
        "TILE_US": tiles.TILE_US,
        "HANDOVER_US": tiles.HANDOVER_US,
        "HANDOVER_US_PER_VALUE": tiles.HANDOVER_US_PER_VALUE,
        **{f"step of {tuple(tile)}": us for tile, us in tiles.HOPPER[format].items()},
        **{f"LIBRARY.{name}": getattr(library, name) for name in ("launch", "weight", "product")},
    }


def fit(measured: dict[Key, dict]) -> tuple[dict[str, float], torch.Tensor]:
    """(figures of one format, the relative error of the formula at each sample)."""
    samples = [(key, kernel, us) for key, all in measured.items() for kernel, us in all.items()]
    samples = [(key, kernel, us) for key, kernel, us in samples if isinstance(kernel, Hopper | str)]
    columns = {("activation", key): i for i, key in enumerate(measured)}
    for key, kernel, _ in samples:
        for name in terms(key, kernel):
            columns.setdefault(name, len(columns))
    matrix = torch.zeros(len(samples), len(columns), dtype=torch.float64)
    for i, (key, kernel, us) in enumerate(samples):
        matrix[i, columns["activation", key]] = 1 / us
        for name, factor in terms(key, kernel).items():
            matrix[i, columns[name]] = factor / us
    scale = matrix.abs().amax(0)  # columns differ by ten orders of magnitude
    ones = torch.ones(len(samples), 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(matrix / scale, ones).solution[:, 0] / scale
    off = (matrix @ solution - 1).abs()
    return {name: solution[i].item() for name, i in columns.items() if isinstance(name, str)}, off


def slower(measured: dict[Key, dict]) -> dict[Key, float]:
    """At each shape the time of the kernel that `choose` takes over the fastest candidate's; NaN: not measured."""
    return {key: all.get(tiles.choose(*key), float("nan")) / min(all.values()) for key, all in measured.items()}


def _fastest(all: dict, kind) -> tuple | None:
    """(kernel, microseconds) of the fastest candidate of that kind."""
    found = [(kernel, us) for kernel, us in all.items() if isinstance(kernel, kind)]
    return min(found, key=lambda pair: pair[1], default=None)


def check_fused(measured: dict[Key, dict]) -> list[str]:
    """A line for each shape at which the tile of FUSED, however it splits K, is not the fastest fused one."""
    lines = []
    for (format, rows, n, k), all in measured.items():
        best = _fastest(all, Fused)
        if best is None:
            continue
        most, pair = next((most, pair) for most, pair in tiles.FUSED[format].items() if rows <= most)
        tile = pair[n > tiles.NARROW_N]
        us = min(all.get(tile._replace(split_k=split_k), float("inf")) for split_k in (1, 2, 4))
        if us > best[1]:
            lines.append(
                f"{format} FUSED[{most}], {rows} rows of {n}x{k}: {us / best[1] - 1:.0%} slower than {best[0]}"
            )
    return lines


def check_bounds(measured: dict[Key, dict]) -> list[str]:
    """A line for each shape at which LEAST_ROWS or LIBRARY_ROWS excludes the fastest kind of kernel."""
    lines = []
    for (format, rows, n, k), all in measured.items():
        fused, hopper, library = (_fastest(all, kind) for kind in (Fused, Hopper, str))
        least = tiles.LEAST_ROWS[format][n > tiles.NARROW_N]
        if fused and hopper and (rows > least) != (hopper[1] < fused[1]):
            lines.append(
                f"{format} LEAST_ROWS {least}, {rows} rows of {n}x{k}: fused {fused[1]}, hopper {hopper[1]} us"
            )
        if library and hopper and rows < tiles.LIBRARY_ROWS and library[1] < hopper[1]:
            lines.append(f"{format} LIBRARY_ROWS, {rows} rows of {n}x{k}: library {library[1]}, hopper {hopper[1]} us")
    return lines


def main() -> None:
    measured = read_tuning(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else KEPT)
    for format in FORMATS:
        figures, off = fit({key: all for key, all in measured.items() if key[0] == format})
        print(f"{format}: {len(off)} samples, error {off.mean():.1%} on average, {off.quantile(0.95):.1%} in 19 of 20")
        for name, value in sorted(in_file(format).items()):
            found = f"{figures[name]:.3g}" if name in figures else "not measured"
            print(f"    {name:32} in the file {value:<9.3g} fitted {found}")
    seen = {next(most for most in tiles.FUSED[f] if rows <= most) for f, rows, *_ in measured if rows <= 128}
    unseen = sorted({most for table in tiles.FUSED.values() for most in table} - seen)
    print(
        "not measured: GEMV,",
        *(f"FUSED[{most}]," for most in unseen),
        "LEAST_ROWS below",
        min(key[1] for key in measured),
    )
    print(*check_fused(measured), *check_bounds(measured), sep="\n")
    ratios = slower(measured)
    for key, ratio in ratios.items():
        if not ratio < 1.02:
            print(*key, f"{ratio - 1:.0%} slower than the fastest: {tiles.choose(*key)}")
    known = [ratio for ratio in ratios.values() if ratio == ratio]
    mean, most = sum(known) / len(known) - 1, max(known) - 1
    print(f"{len(known)} of {len(ratios)} shapes: {mean:.1%} slower on average, {most:.0%} at most")


if __name__ == "__main__":
    main()
