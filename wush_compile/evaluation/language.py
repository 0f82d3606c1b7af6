"""Perplexity, KL divergence and top-1 agreement of language models (docs/spec.md §5)."""

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import check_ids
from ..errors import DataError
from ..ops import core as ops  # noqa: F401  (registers wush::observe)

# fp32 logits handled at once. A few temporaries of this size stay far below 1 GiB.
CHUNK_LOGITS = 2**24
# Windows in one forward on a GPU. A CPU takes one.
GPU_WINDOWS = 8


@dataclass(frozen=True)
class Comparison:
    """A model and its reference on the same tokens.

    `kl` is the mean of KL(reference ‖ model) over predicted tokens, in nats. `top1` is the share of positions where
    both give the same token the highest probability. `predictions` counts the predicted tokens.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    predictions: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def perplexity(
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    window: int = 2048,
    progress: bool = True,
    prefix: Sequence[int] = (),
) -> float:
    """exp of the mean cross entropy of `model` on `token_ids` [T] or [1, T], in windows of `window` without overlap.

    Each window is predicted from its own tokens alone, in fp32: window − 1 predictions. `prefix` has the tokens that
    each window begins with, in its `window` tokens: `data.special_tokens(tokenizer)[0]` for a model that was trained
    with BOS in front of each text. They predict and are not predicted. Tokens after the last full window are left out.
    A text shorter than a window is one window. Raises `DataError` for fewer than 2 tokens, and for ids outside the
    vocabulary.
    """
    total, count = 0.0, 0
    for (logp,), targets in _predictions((model,), token_ids, window, "perplexity", progress, prefix):
        total -= logp.gather(-1, targets[:, None]).sum(dtype=torch.float64).item()
        count += len(targets)
    return _exp(total / count)


def kl_divergence(
    reference: nn.Module,
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    window: int = 2048,
    progress: bool = True,
    prefix: Sequence[int] = (),
) -> float:
    """The mean of KL(reference ‖ model) over predicted tokens, in nats. Arguments are those of `compare`."""
    return compare(reference, model, token_ids, window, progress, prefix).kl


def compare(
    reference: nn.Module,
    model: nn.Module,
    token_ids: Tensor | Sequence[int],
    window: int = 2048,
    progress: bool = True,
    prefix: Sequence[int] = (),
) -> Comparison:
    """KL, top-1 agreement and both perplexities, from one forward of each model for each window.

    `token_ids`, `window` and `prefix` are those of `perplexity`.
    """
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for (logp, logq), targets in _predictions((reference, model), token_ids, window, "compare", progress, prefix):
        p = logp.exp()
        kl = torch.where(p > 0, p * (logp - logq), 0).sum(dtype=torch.float64)  # [n, V] -> []
        agree = (logp.argmax(-1) == logq.argmax(-1)).sum(dtype=torch.float64)
        losses = [-log.gather(-1, targets[:, None]).sum(dtype=torch.float64) for log in (logp, logq)]
        sums += torch.stack((kl, agree, *losses)).cpu()
        count += len(targets)
    kl, agree, reference_loss, loss = (sums / count).tolist()
    return Comparison(kl, agree, _exp(loss), _exp(reference_loss), count)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _predictions(
    models: Sequence[nn.Module],
    token_ids: Tensor | Sequence[int],
    window: int,
    title: str,
    progress: bool,
    prefix: Sequence[int],
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yields ([log-probabilities of each model, fp32 [n, V]], targets int64 [n]), on the device of the last model."""
    rows = _windows(token_ids, window, prefix)  # [W, window]
    given = max(1, len(prefix))  # tokens of a window that nothing predicts
    devices = [next(m.parameters()).device for m in models]
    check_ids(rows, min(_vocabulary(m) for m in models), "token_ids")
    step = 1 if devices[-1].type == "cpu" else GPU_WINDOWS
    with inference_mode(models), tqdm(total=len(rows), desc=title, unit="window", disable=not progress or None) as bar:
        for batch in rows.split(step):
            logits = [
                _logits(m, batch.to(d))[:, given - 1 : -1].flatten(0, 1) for m, d in zip(models, devices, strict=True)
            ]
            targets = batch[:, given:].flatten().to(devices[-1])
            chunk = max(1, CHUNK_LOGITS // logits[-1].shape[-1])
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                yield [each[part].to(devices[-1]).to(torch.float32).log_softmax(-1) for each in logits], targets[part]
            bar.update(len(batch))


def _windows(token_ids: Tensor | Sequence[int], window: int, prefix: Sequence[int]) -> Tensor:
    """Token ids [T] or [1, T] -> int64 [W, window] with the prefix; fewer than a window are one row."""
    ids = torch.as_tensor(token_ids)
    if ids.is_floating_point() or ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise DataError(f"token_ids are {ids.dtype} {list(ids.shape)}: give integers of shape [T] or [1, T]")
    own = window - len(prefix)
    if own < 1 or window < 2:
        raise DataError(
            f"window is {window}: give at least {max(2, 1 + len(prefix))}, because a window needs a token to predict "
            "and one to predict it from"
        )
    ids = ids.reshape(-1).to("cpu", torch.int64)
    if len(ids) < 2:
        raise DataError(f"token_ids holds {len(ids)} tokens: give at least 2, because 1 token predicts nothing")
    own = min(own, len(ids))
    rows = ids[: len(ids) // own * own].view(-1, own)
    return torch.cat([torch.tensor(list(prefix), dtype=torch.int64).expand(len(rows), -1), rows], 1)


def _vocabulary(model: nn.Module) -> int:
    """Rows of the model's input embedding. If the model has none, every id passes."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding.weight.shape[0] if embedding is not None else torch.iinfo(torch.int64).max


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [B, S] -> logits [B, S, V]."""
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(ids, **uncached)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise DataError(f"{type(model).__name__} gives no logits for each token: perplexity is for language models")
    return logits


@contextlib.contextmanager
def inference_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode and no gradients inside the block. Afterwards every module has its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
