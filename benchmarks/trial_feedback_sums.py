"""Trial: how many codes differ where the sums of rounding with feedback are added up in another way (docs/spec.md §4).

    python benchmarks/trial_feedback_sums.py --out trial.json          # ten seconds on one CPU core

Shares of bytes of codes that differ from the reference's, of normal values and of numbers F up to --largest:

    float64       sums in float64
    reversed      the last product first
    parts         sums of four products each, then their sum
    18 bits       sums cut to multiples of 2^-18 of the largest that they could be, as a coarse accumulator does
    wide errors   errors that are not rounded to bf16: not the definition
    norm          RMSNorm's 1 / root is 2^-23 larger; and the share of its bf16 values that change
    norm, nearest the same without feedback

In wush_compile/diagnostics `FEEDBACK_SHARE` lies between `18 bits` and `wide errors`, `NORM_SHARE` above `norm`.
"""

import argparse
import types
from pathlib import Path
from unittest import mock

import common
import torch
from torch import Tensor

from wush_compile import feedback


def by_float64(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.double(), b.double()).float()


def reversed_(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flip(-1), b.flip(-2))


def by_parts(a: Tensor, b: Tensor) -> Tensor:
    return sum(torch.bmm(*pair) for pair in zip(a.split(4, -1), b.split(4, -2)))


def cut(a: Tensor, b: Tensor) -> Tensor:
    largest = torch.bmm(a.abs(), b.abs()).double().clamp(min=1e-30)
    unit = torch.exp2(largest.log2().floor() - 18)
    return ((torch.bmm(a.double(), b.double()) / unit).trunc() * unit).float()


SUMS: dict[str, dict[str, object]] = {
    "float64": {"bmm": by_float64},
    "reversed": {"bmm": reversed_},
    "parts": {"bmm": by_parts},
    "18 bits": {"bmm": cut},
    "wide errors": {"bfloat16": torch.float32},
}


def share(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return (a[0] != b[0]).double().mean().item()


def trial(format: str, x: Tensor, f: Tensor) -> dict[str, float]:
    """Shares of one format."""

    def quantize(x: Tensor, on: bool) -> tuple[Tensor, Tensor]:
        return feedback.quantize(x, format, "mse", None, f if on else None)

    result, wanted = {}, quantize(x, True)
    for name, names in SUMS.items():
        with mock.patch.object(feedback, "torch", types.SimpleNamespace(**vars(torch) | names)):
            result[name] = share(quantize(x, True), wanted)
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True))
    normed, other = ((x * f).bfloat16() for f in (factor, factor * (1 + 2**-23)))
    result["norm's values"] = (normed != other).double().mean().item()
    result["norm"] = share(quantize(normed, True), quantize(other, True))
    result["norm, nearest"] = share(quantize(normed, False), quantize(other, False))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--largest", type=float, default=0.9)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    result = common.environment(torch.device("cpu"))
    for format in feedback.FORMATS:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(args.rows, 2048, generator=generator)
        f = torch.rand(feedback.shape(format, 2048), generator=generator) * 2 - 1
        f = (f * args.largest).to(torch.bfloat16)
        result[format] = trial(format, x, f)
        print(f"{format}: " + ", ".join(f"{name} {value:.1e}" for name, value in result[format].items()), flush=True)
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
