"""Trial: which bytes around that of `absmax` NVFP4's rule `search` tries (docs/spec.md §4).

    python benchmarks/trial_scale_offsets.py --out trial.json          # half a minute on one CPU core

Normal groups whose amplitudes vary over eight octaves, as many as --groups. For each number of bytes: the offsets, that
of `absmax` among them, whose best byte of each group has the least squared error in all; errors are relative to that of
`mse`. And how often `mse` takes a byte that `search` does not try.
"""

import argparse
import itertools
from pathlib import Path

import common
import torch

from wush_compile import formats

OFFSETS = range(-4, 8)
SIZES = (1, 2, 3, 4, 6, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2**18)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.groups, 16, generator=generator)
    x *= torch.rand(args.groups, 1, generator=generator).mul(8).exp2()
    power = x.square().sum(-1).double()  # all groups count alike

    def share(byte: torch.Tensor) -> torch.Tensor:
        decoded = formats.decode(formats.encode(x, byte, "nvfp4"), byte, "nvfp4")
        return (decoded - x).square().sum(-1).double() / power

    first = formats.compute_scales(x, "nvfp4", "absmax")
    mse, search = (formats.compute_scales(x, "nvfp4", rule) for rule in ("mse", "search"))
    bytes_ = {offset: (first.int() + offset).clamp(0x01, 0x7E).to(torch.uint8) for offset in OFFSETS}
    errors = {offset: share(byte) for offset, byte in bytes_.items()}
    unit = share(mse).mean()

    def error(offsets: tuple[int, ...]) -> float:
        return (torch.stack([errors[offset] for offset in offsets]).amin(0).mean() / unit).item()

    result = {**common.environment(torch.device("cpu")), "search": (share(search).mean() / unit).item(), "best": {}}
    for size in SIZES:
        others = itertools.combinations([offset for offset in OFFSETS if offset], size - 1)
        offsets = min(((0, *some) for some in others), key=error)
        result["best"][str(size)] = {"offsets": offsets, "error": error(offsets)}
        print(f"{size} bytes: {error(offsets):.3f} of the error of mse, offsets {offsets}", flush=True)
    tried = torch.stack([bytes_[offset] for offset in formats.SEARCH_OFFSETS])
    result["mse elsewhere"] = (mse != tried).all(0).double().mean().item()
    print(f"search: {result['search']:.3f}; mse takes another byte in {result['mse elsewhere']:.2%} of the groups")
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
