"""The head's product in 8 bits against cuBLAS in bf16, by number of rows: weights of Llama-3.1-8B's head by default.

    python benchmarks/head_speed.py --out head_speed.json
    python benchmarks/head_speed.py --out head_speed.json --tune      also every tile of the list below

Microseconds of one product, by the clock of `kernel_speed.py`.
"""

import argparse
import itertools
from pathlib import Path

import common
import torch
from kernel_speed import bf16_time, copies, time_us

from wush_compile import formats
from wush_compile.kernels.triton.linear.choose import HOPPER_INT8, Int8, Int8Gemv, choose_int8
from wush_compile.kernels.triton.linear.fp4_linear import fp4_linear

GEMV = [Int8Gemv(n, k, w) for n, k, w in itertools.product((4, 8, 16, 32), (256, 1024, 2048, 4096), (2, 4, 8))]
TILES = [Int8(n, m, k, w, s) for n, m, k, w, s in itertools.product((64, 128), (16, 32, 64), (64, 128), (4, 8), (3, 5))]


def candidates(rows: int, tune: bool) -> list:
    tiles = GEMV if rows == 1 else [t for t in TILES if t.block_m >= min(rows, 64)] if rows <= 64 else []
    hopper = HOPPER_INT8 if torch.cuda.get_device_capability() == (9, 0) else []
    return [None, *([*tiles, *hopper] if tune else [])]


def measure(packed: list, n: int, k: int, rows: int, tune: bool) -> dict:
    x = torch.randn(rows, k, device="cuda").bfloat16()
    none = x.new_empty((rows, 0), dtype=torch.float32)
    row = {"M": rows, "bf16 us": bf16_time(rows, n, k)}
    tried = {}
    for tile in candidates(rows, tune):

        def call(codes, scales, tile=tile):
            return fp4_linear(
                x, none, None, codes, scales, None, None, None, "int8", torch.bfloat16, tile, activation_format="none"
            )

        try:
            us = time_us([lambda p=p: call(*p) for p in packed])
        except Exception as error:  # a tile that does not fit this device
            print(rows, tile, str(error).split("\n")[0], flush=True)
            continue
        tried[str(tile or choose_int8(rows, n, k))] = us
    chosen = str(choose_int8(rows, n, k))
    row |= {"int8 us": tried[chosen], "chosen": chosen, "gain": row["bf16 us"] / tried[chosen]}
    return row | ({"fastest": sorted(tried.items(), key=lambda pair: pair[1])[:4]} if tune else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(128256, 4096), metavar=("N", "K"))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("head_speed.json"))
    args = parser.parse_args()
    n, k = args.shape
    packed = [formats.quantize(torch.randn(n, k, device="cuda"), "int8", "absmax") for _ in range(copies(n * k))]
    result = {**common.environment(torch.device("cuda")), "shape": list(args.shape), "rows": []}
    for rows in args.rows:
        result["rows"].append(measure(packed, n, k, rows, args.tune))
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
