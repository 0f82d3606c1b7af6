"""The paper's Figure 5 on SmolLM2: the RMS of each channel of a layer's input and weight, under five transforms.

    python paper/equalization.py --data FOLDER --out equalization.json

FOLDER holds valid.txt of WikiText-2 raw. Of the RMS of the transformed weight and input of q_proj and down_proj in a
middle block; WUSH makes both sides' channels alike, and the two sides alike (eq. 36).
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import common

from wush_compile import WushConfig
from wush_compile.data import windows
from wush_compile.demo import smollm2
from wush_compile.solver.choose import Transforms
from wush_compile.solver.transforms import apply_blockwise, diagonal_blocks

BLOCK, GROUP, LINEARS = 15, 32, ("self_attn.q_proj", "mlp.down_proj")


def profiles(weight: torch.Tensor, x: torch.Tensor) -> dict[str, dict[str, list[float]]]:
    """RMS of the channels of X and W, by transform: lists of K numbers. weight [N, K], x [n, K], float64."""
    found, k = {}, weight.shape[1]
    moment = diagonal_blocks(x.mT @ x / x.shape[0], GROUP)  # [K/B, B, B]
    for kind in ("identity", "hadamard", "smooth", "wus", "wush"):
        if kind == "smooth":  # a diagonal T: SmoothQuant with α = 1/2
            scale = (weight.abs().amax(0) / x.abs().amax(0).clamp(min=1e-9)).sqrt()
            t, inverse = (torch.diag_embed(s.view(k // GROUP, GROUP)) for s in (scale, 1 / scale))
        else:
            config = WushConfig(transform=kind, solver="rtn", activation_rounding="nearest")
            t, inverse = Transforms(config, moment, GROUP, torch.float32, kind).all(weight.mT.contiguous(), None)
        sides = {
            "activation": apply_blockwise(x.mT, None if t is None else t.double()),
            "weight": apply_blockwise(weight.mT, None if inverse is None else inverse.mT),
        }
        found[kind] = {side: v.square().mean(1).sqrt().tolist() for side, v in sides.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="of 256 tokens")
    args = parser.parse_args()
    model, tokenizer = common.load_smollm2(args.model, torch.device("cpu"))
    layer, seen = model.model.layers[BLOCK], {}
    for name in LINEARS:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).append(x[0].detach().flatten(0, 1).double())
        )
    with torch.no_grad():
        for ids in windows(common.wikitext(args.data, "valid"), tokenizer, 256, args.windows):
            model.model(ids)
    result = {
        **common.environment(torch.device("cpu")),
        "model": smollm2.FILE if args.model is None else args.model.name,
        "block": BLOCK,
        "calibration": f"{args.windows} windows of 256 tokens of WikiText-2 valid",
        "rms": {
            name: profiles(layer.get_submodule(name).weight.detach().double(), torch.cat(seen[name]))
            for name in LINEARS
        },
    }
    for name, kinds in result["rms"].items():
        for kind, sides in kinds.items():
            for side, values in sides.items():
                sides[side] = [float(f"{v:.4g}") for v in values]
            spread = {side: max(v) / sorted(v)[len(v) // 2] for side, v in sides.items()}
            print(f"{name} {kind}: largest / median {spread['activation']:.2f} and {spread['weight']:.2f}")
    common.write_json(args.out, result)


if __name__ == "__main__":
    main()
