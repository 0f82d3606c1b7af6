"""Trial: the rotation of T that makes the four steps of rounding with feedback equally dear, beside Had, which it
replaced; each with several powers of s.

    python benchmarks/trial_rotation.py --out trial.json --formats mxfp4        the text of `make demo`, on a CPU
    python benchmarks/trial_rotation.py --data FOLDER --out trial.json          the protocol of trial_token_weights.py

With Had errors of place k of the steps cost Had_4 diag(d) Had_4 of four singular values. Its Cholesky factor has a
diagonal that falls from step to step, and the mean of the squares is what rounding costs. Had takes its columns in the
order in which the four values differ most.
"""

import itertools

import common
import torch
import trial_token_weights as trial
from torch import Tensor

from wush_compile.solver import choose
from wush_compile.solver.transforms import hadamard_matrix

ROTATION = choose.rotation
POWERS = {
    "less-3/16": "default-3/16",
    "less-1/8": "default-1/8",
    "less-1/16": "default-1/16",
    "same": "default",
    "more-1/16": "default+1/16",
    "more-1/8": "default+1/8",
}


def hadamard(d: Tensor) -> Tensor:
    """[b, B] -> Had [b, B, B]: the two highest bits of a value's rank become bits 3 and 2 of its column."""
    size = d.shape[-1]
    rank, low = torch.arange(size), size // 4
    rest = rank % low  # the rank's other bits; the last two stay, those above make room
    columns = rest // 4 * 16 + rank // low * 4 + rest % 4
    return hadamard_matrix(size)[:, columns].to(d).expand(len(d), -1, -1)


def main() -> None:
    parser = common.trial_parser(__doc__, __file__)
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    parser.add_argument("--rotations", nargs="+", default=["hadamard", "rotation"], choices=["hadamard", "rotation"])
    parser.add_argument("--powers", nargs="+", default=["same"], choices=POWERS, help="beside the library's power of s")
    parser.add_argument("--first-windows", nargs="+", type=int, default=[0], help="of calibration, with --data")
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    result = {**common.environment(device), "rows": []}
    every = itertools.product(args.first_windows, args.formats, args.rotations, args.powers)
    for first, format, name, power in every:
        data, ids, window = common.smollm2_texts(args.data, tokenizer, device, first=first)
        choose.rotation = hadamard if name == "hadamard" else ROTATION
        row = trial.measure(model, data, ids, window, format, "same", POWERS[power])
        result["rows"].append(row | {"row": name, "first_window": first})
        print(result["rows"][-1], flush=True)
        common.write_json(args.out, result)


if __name__ == "__main__":
    main()
