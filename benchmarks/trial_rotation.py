"""Trial: a rotation that makes the four steps of rounding with feedback equally dear, in place of Had_4.

    python benchmarks/trial_rotation.py --out trial.json --formats mxfp4        the text of `make demo`, on a CPU
    python benchmarks/trial_rotation.py --data FOLDER --out trial.json          the protocol of trial_token_weights.py

After WUSH's T errors of place k of the steps cost Had_4 diag(d) Had_4 of four singular values (docs/spec.md §4). Its
Cholesky factor has a diagonal that falls from step to step, and the mean of the squares is what rounding costs. Of all
rotations in place of Had_4 the geometric mean decomposition (Jiang, Hager, Li 2005) has a factor of equal diagonal: the
mean is least. Then steps differ in size, which the group's scale feels. Values of a quadruple are those of ranks r,
2·G/4 − 1 − r, 2·G/4 + r and G − 1 − r, so that quadruples are alike. Only T and the numbers of feedback change.
"""

import argparse
import math
from pathlib import Path

import common
import torch
import trial_token_weights as trial
from torch import Tensor

from wush_compile.feedback import STEPS, by_step
from wush_compile.solver import choose
from wush_compile.solver.feedback import DAMPING
from wush_compile.solver.transforms import hadamard_matrix

HADAMARD = choose.wush_transform, choose.feedback_of


def equal_diagonal(sigma: Tensor) -> Tensor:
    """sigma [n] -> an orthogonal G [n, n] with Gᵀ diag(sigma²) G = RᵀR, R upper with equal entries on its diagonal."""
    size, mean = len(sigma), float(sigma.log().mean().exp())
    r, g = torch.diag(sigma), torch.eye(size, dtype=sigma.dtype)
    for k in range(size - 1):
        rest = r.diagonal()[k:]
        other = k + int(rest.argmin() if rest[0] >= mean else rest.argmax())
        order = torch.arange(size)
        order[[k + 1, other]] = order[[other, k + 1]]
        r, g = r[order][:, order], g[:, order]
        first, second = float(r[k, k]), float(r[k + 1, k + 1])
        c = 1.0 if first == second else math.sqrt(max(0.0, (mean**2 - second**2) / (first**2 - second**2)))
        s = math.sqrt(max(0.0, 1 - c * c))
        right = torch.tensor([[c, -s], [s, c]], dtype=sigma.dtype)
        left = torch.tensor([[c * first, -s * second], [s * second, c * first]], dtype=sigma.dtype) / mean
        pair = slice(k, k + 2)
        r[:, pair], g[:, pair] = r[:, pair] @ right, g[:, pair] @ right
        r[pair] = left.T @ r[pair]
    return g


def rotation(d: Tensor) -> Tensor:
    """d [G], what errors along each singular vector cost, the largest first -> what stands for Had [G, G]."""
    size, count = len(d), len(d) // STEPS
    had, channels = hadamard_matrix(count), by_step(torch.arange(size))  # [4, n]
    found = torch.zeros(size, size, dtype=torch.float64)
    for k in range(count):
        ranks = [t * count + (k if t % 2 == 0 else count - 1 - k) for t in range(STEPS)]
        steps = equal_diagonal(d[ranks].sqrt()).T
        for s in range(STEPS):
            found[channels[s][:, None], torch.tensor(ranks)] = had[:, k, None] * steps[s]
    return found


def rotated_transform(root: Tensor, gram: Tensor, damping: float, hadamard: bool, power: float, order) -> Tensor:
    """`wush_transform` with `rotation`, for blocks of one group."""
    if order is None:
        return HADAMARD[0](root, gram, damping, hadamard, power, order)
    plain = HADAMARD[0](root, gram, damping, False, power, None)  # diag(c s^p) Vᵀ L⁻¹
    inverse = torch.linalg.inv(plain)
    d = (inverse.mT @ gram @ inverse).diagonal(dim1=-2, dim2=-1)  # [b, B]
    had = hadamard_matrix(plain.shape[-1]).to(plain)
    dead = gram.diagonal(dim1=-2, dim2=-1).sum(-1) == 0
    turned = [
        had if zero else rotation(own.clamp(min=1e-8 * float(own.max())).cpu()).to(plain) @ t
        for t, own, zero in zip(plain, d, dead.tolist(), strict=True)
    ]
    return torch.stack(turned)


def feedback_of(cost: Tensor, group: int) -> Tensor:
    """`solver.feedback.feedback_of` for any rotation of the steps: S̃ float64 [K/G, G, G] -> bf16 [K/G, 6, G/4]."""
    had, channels = hadamard_matrix(group // STEPS).to(cost), by_step(torch.arange(group))
    blocks = cost[:, channels[:, :, None, None], channels]  # [K/G, 4, n, 4, n]
    matrix = torch.einsum("kl,bsltm,mk->bkst", had, blocks, had)  # of each frequency: [K/G, n, 4, 4]
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean((-1, -2))[:, None, None, None]
    scaled = torch.where(mean > 0, matrix / mean, 0.0) + DAMPING * torch.eye(STEPS).to(cost)
    root = torch.linalg.cholesky(scaled).mT
    ratio = root / root.diagonal(dim1=-2, dim2=-1)[..., None]
    numbers = torch.stack([ratio[..., s, u] for u in range(1, STEPS) for s in range(u)], 1)
    return (numbers @ had / had.shape[0] ** 0.5).to(torch.bfloat16).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with valid.txt and test.txt; the text of `make demo` without")
    parser.add_argument("--model", type=Path, help="the SmolLM2 GGUF file or a model directory; fetched when left out")
    parser.add_argument("--out", type=Path, default=Path("trial_rotation.json"))
    parser.add_argument("--formats", nargs="+", default=["mxfp4", "nvfp4"], choices=["mxfp4", "nvfp4"])
    args = parser.parse_args()
    device = common.device("auto")
    model, tokenizer = common.load_smollm2(args.model, device)
    data, ids, window = common.smollm2_texts(args.data, tokenizer, device)
    result = {**common.environment(device), "rows": []}
    for format in args.formats:
        for name, parts in (("hadamard", HADAMARD), ("rotation", (rotated_transform, feedback_of))):
            choose.wush_transform, choose.feedback_of = parts
            row = trial.measure(model, data, ids, window, format, "same", "default") | {"row": name}
            result["rows"].append(row)
            print(row, flush=True)
            common.write_json(args.out, result)


if __name__ == "__main__":
    main()
