"""SpinQuant's learned rotation (Liu et al., 2025): gradient steps on the manifold of orthogonal matrices.

The rotation of the residual stream begins as a Hadamard matrix with random signs. Each step takes the model's own
cross entropy with activations in 4 bits and weights in full precision, and moves the rotation by a Cayley transform, so
that it stays orthogonal. The authors take 100 steps, a learning rate of 1.5 with cosine decay, and no momentum.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .. import formats
from ..config import DEFAULT_IGNORE, ignored_by
from ..data import Batch
from ..errors import DataError
from ..ops import core as ops  # noqa: F401  (registers wush::transform_quantize)
from .hadamard import random_hadamard
from .rotate import fold_norms, rotate_input
from .stream import Stream, find_stream, traced

STEPS, RATE = 100, 1.5


def cayley_step(r: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of Cayley SGD (Li et al., 2020) from r [K, K], orthogonal, against the gradient of the loss; fp64.

    r moves along the skew-symmetric part of its gradient. Steps are bounded by 1 / ‖W‖₁, as there.
    """
    m = -gradient.mT @ r  # [K, K]
    w = (m - m.mT) / 2
    rate = min(rate, 1 / (float(w.abs().sum(0).max()) + 1e-8))
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    return torch.linalg.solve(eye - rate / 2 * w, (eye + rate / 2 * w) @ r.mT).mT


def learn_rotation(
    model: nn.Module,
    batches: list[Batch],
    format: str,
    rule: str = "mse",
    steps: int = STEPS,
    rate: float = RATE,
    seed: int = 0,
    progress: bool = True,
    losses: list[float] | None = None,
) -> Tensor:
    """A rotation of the residual stream for `rotate`: float64 [K, K], orthogonal. The model does not change.

    batches   of token ids; step i takes batch i, and begins again after the last
    format    of activations, whose scales follow `rule`
    losses    a list that gets the loss of each step
    """
    net = copy.deepcopy(model).requires_grad_(False).eval()
    stream = find_stream(traced(net, batches[:1]))
    fold_norms(net, stream)
    for name in stream.writers:
        rotate_input(net, name)
    r = random_hadamard(net.get_submodule(stream.embeddings[0]).weight.shape[1], seed)
    device = next(net.parameters()).device
    r = r.to(device)
    found = [] if losses is None else losses
    with _rounded_inputs(net, stream, format, rule), tqdm(total=steps, desc="SpinQuant", disable=not progress) as bar:
        for step, batch in zip(range(steps), itertools.cycle(batches)):
            ids = _ids(batch).to(device)
            current = r.to(torch.float32).requires_grad_(True)
            logits = torch.func.functional_call(net, _rotated(net, stream, current), (ids,)).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            [gradient] = torch.autograd.grad(loss, current)
            if not torch.isfinite(gradient).all():
                raise DataError(f"SpinQuant: the gradient of step {step} is not finite: take a lower rate")
            r = cayley_step(r, gradient.double(), rate * (1 + math.cos(math.pi * step / steps)) / 2)
            found.append(float(loss.detach()))
            bar.update()
            bar.set_postfix(loss=f"{found[-1]:.3f}")
    return r.cpu()


def _ids(batch: Batch) -> Tensor:
    return batch["input_ids"] if isinstance(batch, dict) else batch[0]


def _rotated(net: nn.Module, stream: Stream, r: Tensor) -> dict[str, Tensor]:
    """The weights (and biases) that touch the stream, rotated by r, differentiable in r."""
    found = {}
    behind = [name for norm in stream.norms for name in norm.readers]
    for name in dict.fromkeys((*stream.embeddings, *stream.readers, *behind)):
        weight = net.get_submodule(name).weight
        found[f"{name}.weight"] = (weight.float() @ r).to(weight.dtype)
    for name in stream.writers:
        linear = net.get_submodule(name)
        found[f"{name}.weight"] = (r.mT @ linear.weight.float()).to(linear.weight.dtype)
        if linear.bias is not None:
            found[f"{name}.bias"] = (r.mT @ linear.bias.float()).to(linear.bias.dtype)
    return found


@contextlib.contextmanager
def _rounded_inputs(net: nn.Module, stream: Stream, format: str, rule: str) -> Iterator[None]:
    """Rounds the inputs of the linears of the blocks; gradients pass as if they were not rounded."""

    def hook(_, args: tuple) -> tuple:
        x = args[0]
        with torch.no_grad():
            most = x.abs().amax().to(torch.float32).clamp(min=1e-20)
            g = (formats.E4M3_MAX * formats.E2M1_MAX / most).reshape(1) if format == "nvfp4" else None
            codes, scales = torch.ops.wush.transform_quantize(x, None, g, format, rule)
            difference = formats.dequantize(codes, scales, format, g).to(x.dtype) - x
        return x + difference, *args[1:]

    names = [*stream.writers, *(n for norm in stream.norms for n in norm.readers)]
    names = [name for name in names if not ignored_by(name, DEFAULT_IGNORE)]
    handles = [net.get_submodule(name).register_forward_pre_hook(hook) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
