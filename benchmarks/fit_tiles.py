"""Fits the figures of `triton_choose.hopper_times` to what `kernel_speed.py tune-linear` measured.

    python benchmarks/fit_tiles.py results/tune-linear.json

A candidate's time is taken for what the activation costs at that shape, whoever multiplies it, plus the formula: least squares of
relative errors. Prints the figures, and by how much the kernels that they would choose are slower than the fastest measured.
"""

import json
import pathlib
import sys

import torch

from wush_compile.kernels.triton.linear import choose as triton_choose
from wush_compile.kernels.triton.linear.choose import MULTIPROCESSORS, Hopper

Key = tuple[str, int, int, int]  # format, rows, N, K


def read(path: pathlib.Path) -> dict[Key, dict]:
    """Microseconds of each candidate at each shape; a kernel with a name is "library" or "bf16"."""
    rows = json.loads(path.read_text())["rows"]
    return {
        (row["format"], row["M"], row["N"], row["K"]): {
            eval(name, {"Hopper": Hopper}): us for us, name in row["all"] if not name.startswith(("Fused", "Gemv"))
        }
        for row in rows
    }  # our own repr of a kernel's tile


def terms(key: Key, tile: Hopper) -> dict[str, float]:
    """The formula as coefficients of its figures."""
    format, rows, n, k = key
    steps, step = k // 128, f"step {tile._replace(split=1)!r}"
    waves, tail = divmod(-(-n // tile.bn) * -(-rows // tile.bm), MULTIPROCESSORS)
    if tile.split == 1 or not tail:
        waves += tail > 0
        return {"LAUNCH": waves, step: waves * steps}
    parts, values = -(-tail * tile.split // MULTIPROCESSORS), tile.bn * tile.bm
    return {
        "LAUNCH": waves + parts,
        step: waves * steps + parts * -(-steps // tile.split),
        "HAND": tile.split - 1,
        "VALUE": (tile.split - 1) * values,
    }


def fit(measured: dict[Key, dict]) -> dict[str, float]:
    """Figures of one format."""
    samples = [(key, tile, us) for key, all in measured.items() for tile, us in all.items() if isinstance(tile, Hopper)]
    columns = {("activation", key): i for i, key in enumerate(measured)}
    for key, tile, _ in samples:
        for name in terms(key, tile):
            columns.setdefault(name, len(columns))
    matrix = torch.zeros(len(samples), len(columns), dtype=torch.float64)
    for i, (key, tile, us) in enumerate(samples):
        matrix[i, columns["activation", key]] = 1 / us
        for name, factor in terms(key, tile).items():
            matrix[i, columns[name]] = factor / us
    solution = torch.linalg.lstsq(matrix, torch.ones(len(samples), 1, dtype=torch.float64)).solution[:, 0]
    off = (matrix @ solution - 1).abs()
    print(f"{len(samples)} samples, error {off.mean():.1%} on average, {off.quantile(0.95):.1%} in 19 of 20")
    return {name: solution[i].item() for name, i in columns.items() if isinstance(name, str)}


def losses(measured: dict[Key, dict]) -> None:
    """What `choose` takes at each shape, beside the fastest."""
    for key, all in measured.items():
        chosen = triton_choose.choose(*key)
        best = min(all, key=all.get)
        if chosen not in all:
            print(*key, f"chosen {chosen}: not measured; best {all[best]:.1f} us {best}")
        elif all[chosen] > 1.02 * all[best]:
            print(*key, f"{all[chosen] / all[best] - 1:.0%} slower: {chosen}, best {best}")


def main() -> None:
    measured = read(pathlib.Path(sys.argv[1]))
    for format in ("mxfp4", "nvfp4"):
        print(format)
        for name, value in sorted(fit({key: all for key, all in measured.items() if key[0] == format}).items()):
            print(f"    {name}: {value:.4g}")
    losses(measured)


if __name__ == "__main__":
    main()
