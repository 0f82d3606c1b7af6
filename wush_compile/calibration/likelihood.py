"""A model's own log-likelihood: which of its results are predictions, and the gradient at a sample from them."""

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..capture.export import Captured
from ..ops.core import _uniform

# Rows whose probabilities are computed at a time.
LOGIT_ROWS = 1024
UNIT_STRIDE = 2**20


class NoGradient(Exception):
    """Why a model's tokens cannot be weighted."""


def predictions(captured: Captured) -> dict[str, str]:
    """Returns {node of a result: `categorical` or `normal`}: results named logits, or else all floating-point results.

    Raises `NoGradient` if there are none.
    """
    graph_module = captured.graph_module
    results = next(n for n in graph_module.graph.nodes if n.op == "output").args[0]
    spec = getattr(graph_module, "_out_spec", None)
    structure = None if spec is None else pytree.tree_unflatten(list(results), spec)
    floating = [
        node
        for node in results
        if isinstance(node, fx.Node)
        and isinstance(value := node.meta.get("val"), Tensor)
        and value.is_floating_point()
        and value.dim() > 1
    ]
    entries = structure.items() if isinstance(structure, dict) else ()
    named = {node: str(key) for key, node in entries if isinstance(node, fx.Node)}
    logits = {node.name: "categorical" for node in floating if named.get(node, "").endswith("logits")}
    if not floating:
        raise NoGradient("it returns no floating-point tensor of two dimensions or more")
    return logits or {node.name: "normal" for node in floating}


def sampled_gradient(prediction: Tensor, kind: str, mask: Tensor | None, first_unit: int, seed: int) -> Tensor:
    """d(Σ log p(sample)) / d(prediction), in the dtype of the prediction [B, .., V].

    categorical  the prediction has logits; of each row a token is sampled
    normal       the prediction is the mean of a normal distribution of unit variance

    Row i of sequence b draws by a pseudo-random number of b, i and the seed alone. mask [B, ..]: rows to leave out.
    """
    flat = prediction.reshape(-1, prediction.shape[-1])  # [n, V]
    each, row = len(flat) // prediction.shape[0], torch.arange(len(flat), device=prediction.device)
    number = (first_unit + row // each) * UNIT_STRIDE + row % each
    gradient = torch.empty_like(flat)
    for start in range(0, len(flat), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        draw = _categorical if kind == "categorical" else _normal
        gradient[part] = draw(flat[part].float(), number[part], seed).to(gradient.dtype)
    if mask is not None and mask.shape == prediction.shape[:-1]:
        gradient[mask.reshape(-1) == 0] = 0
    return gradient.view(prediction.shape)


def _categorical(logits: Tensor, number: Tensor, seed: int) -> Tensor:
    """logits [n, V], number [n] -> one-hot(token) - p, the token by inversion of the distribution."""
    p = logits.softmax(-1)
    total, draw = p.cumsum(-1), _uniform(number, seed).to(torch.float32)[:, None]
    token = torch.searchsorted(total, draw * total[:, -1:]).clamp(max=p.shape[-1] - 1)
    return p.neg_().scatter_add_(-1, token, torch.ones_like(draw))


def _normal(mean: Tensor, number: Tensor, seed: int) -> Tensor:
    """mean [n, V], number [n] -> a sample minus its mean."""
    place = number[:, None] * mean.shape[-1] + torch.arange(mean.shape[-1], device=mean.device)
    return torch.special.ndtri(_uniform(place, seed) + 2.0**-32).to(torch.float32)
