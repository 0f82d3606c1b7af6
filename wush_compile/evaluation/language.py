"""What quantization costs: perplexity, KL divergence, top-1 agreement of a language model; losses of single layers (SPEC §5)."""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..ops import core as ops  # noqa: F401  (registers wush::observe)
from ..config import WushConfig
from ..data import check_ids, normalize
from ..errors import DataError, one_of

# fp32 logits handled at once; a few temporaries of this many values stay far below 1 GiB.
CHUNK_ELEMENTS = 2**24
# Windows a GPU runs in one forward; a CPU runs one.
GPU_WINDOWS = 8
# Rows of a layer's input kept for its loss; what is left of them after the rows of largest norm is a uniform sample.
SAMPLE_ROWS = 8192


# -- language models -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Comparison:
    """A model beside its reference on the same tokens.

    kl is the mean over predicted tokens of KL(reference ‖ model) in nats; top1 the share of positions at which both put
    the same token first; predictions the number of tokens predicted.
    """

    kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    predictions: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def perplexity(model: nn.Module, token_ids: Tensor | Sequence[int], window: int = 2048, progress: bool = True) -> float:
    """exp of the mean cross entropy of `model` on `token_ids` [T] or [1, T], in windows of `window` without overlap.

    Each window is predicted from its own tokens alone: window − 1 predictions, no BOS added, fp32 cross entropy. Tokens
    after the last full window are left out; a text shorter than one window is one. `DataError` for fewer than 2 tokens
    and for ids outside the vocabulary.
    """
    total, count = 0.0, 0
    for (logp,), targets in _predictions((model,), token_ids, window, "perplexity", progress):
        total -= logp.gather(-1, targets[:, None]).sum(dtype=torch.float64).item()
        count += len(targets)
    return _exp(total / count)


def kl_divergence(
    reference: nn.Module, model: nn.Module, token_ids: Tensor | Sequence[int], window: int = 2048, progress: bool = True
) -> float:
    """Mean token KL(reference ‖ model) in nats; `token_ids` and `window` as in `perplexity`."""
    return compare(reference, model, token_ids, window, progress).kl


def compare(
    reference: nn.Module, model: nn.Module, token_ids: Tensor | Sequence[int], window: int = 2048, progress: bool = True
) -> Comparison:
    """KL, top-1 agreement and both perplexities from one forward of each model per window; arguments as in `perplexity`."""
    sums, count = torch.zeros(4, dtype=torch.float64), 0
    for (logp, logq), targets in _predictions((reference, model), token_ids, window, "compare", progress):
        p = logp.exp()
        kl = torch.where(p > 0, p * (logp - logq), 0).sum(dtype=torch.float64)   # [n, V] -> []
        agree = (logp.argmax(-1) == logq.argmax(-1)).sum(dtype=torch.float64)
        losses = [-log.gather(-1, targets[:, None]).sum(dtype=torch.float64) for log in (logp, logq)]
        sums += torch.stack((kl, agree, *losses)).cpu()
        count += len(targets)
    kl, agree, reference_loss, loss = (sums / count).tolist()
    return Comparison(kl, agree, _exp(loss), _exp(reference_loss), count)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _predictions(
    models: Sequence[nn.Module], token_ids: Tensor | Sequence[int], window: int, title: str, progress: bool
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Chunks of ([fp32 log-probabilities [n, V] of each model], targets int64 [n]), on the last model's device."""
    rows = _windows(token_ids, window)                                     # [W, window]
    devices = [next(m.parameters()).device for m in models]
    check_ids(rows, min(_vocabulary(m) for m in models), "token_ids")
    step = 1 if devices[-1].type == "cpu" else GPU_WINDOWS
    with _inference(models), tqdm(total=len(rows), desc=title, unit="window", disable=not progress or None) as bar:
        for batch in rows.split(step):
            logits = [_logits(m, batch.to(d))[:, :-1].flatten(0, 1) for m, d in zip(models, devices, strict=True)]
            targets = batch[:, 1:].flatten().to(devices[-1])
            chunk = max(1, CHUNK_ELEMENTS // logits[-1].shape[-1])
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                yield [
                    each[part].to(devices[-1]).to(torch.float32).log_softmax(-1) for each in logits
                ], targets[part]
            bar.update(len(batch))


def _windows(token_ids: Tensor | Sequence[int], window: int) -> Tensor:
    """Token ids [T] or [1, T] -> int64 [W, window], or [1, T] if there are fewer than `window`."""
    ids = torch.as_tensor(token_ids)
    if ids.is_floating_point() or ids.dim() > 2 or (ids.dim() == 2 and ids.shape[0] != 1):
        raise DataError(f"token_ids are {ids.dtype} {list(ids.shape)}; integers of shape [T] or [1, T] are wanted")
    if window < 2:
        raise DataError(f"window is {window}; a window of at least 2 tokens is needed to predict one")
    ids = ids.reshape(-1).to("cpu", torch.int64)
    if len(ids) < 2:
        raise DataError(f"token_ids holds {len(ids)} tokens; at least 2 are needed to predict one")
    window = min(window, len(ids))
    return ids[: len(ids) // window * window].view(-1, window)


def _vocabulary(model: nn.Module) -> int:
    """Rows of the model's input embedding; any id passes where the model does not say."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embedding.weight.shape[0] if embedding is not None else torch.iinfo(torch.int64).max


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Token ids [B, S] -> logits [B, S, V]."""
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(ids, **uncached)
    return output if isinstance(output, Tensor) else output.logits


@contextlib.contextmanager
def _inference(models: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode and no gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


# -- layers ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class LayerLosses:
    """`loss[layer][column]`: eq. 1/4, ‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² / (n N); `relative` is over ‖X Wᵀ‖² / (n N)."""

    loss: dict[str, dict[str, float]]
    relative: dict[str, dict[str, float]]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        """Markdown table of the relative losses, in percent: a row a layer, a column a configuration."""
        columns = list(next(iter(self.relative.values())))
        lines = [f"| relative loss, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for layer, row in self.relative.items():
            lines.append(f"| {layer} | " + " | ".join(f"{100 * row[c]:.3g}" for c in columns) + " |")
        return "\n".join(lines)


def layer_loss(
    model: nn.Module, data: Iterable, layers: Sequence[str],
    configs: Sequence[WushConfig] | Mapping[str, WushConfig], *, tokenizer=None, progress: bool = True,
) -> LayerLosses:
    """Losses of single linears of the unquantized `model`, each solved alone with every configuration (eq. 1, 4).

    layers
        Names of `nn.Linear` modules; their inputs are observed while `model` runs over `data` once.
    configs
        Columns: a mapping from title to configuration, or configurations, titled by the settings they differ in.

    Moments come from all positions whose mask is not 0, losses from a uniform sample of at most 7168 of them.
    """
    from ..solver.loss import layer_loss as measure
    from ..solver.solve import moment_shape, solve

    columns = dict(configs) if isinstance(configs, Mapping) else _titles(configs)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: linears[one_of("linear layer", name, linears)] for name in layers}
    if not chosen or not columns:
        raise DataError("layer_loss needs at least one layer and one configuration")
    observed = _observe(model, normalize(data, tokenizer, model), chosen, progress)
    loss: dict[str, dict[str, float]] = {name: {} for name in chosen}
    relative: dict[str, dict[str, float]] = {name: {} for name in chosen}
    with tqdm(total=len(chosen) * len(columns), desc="layer losses", disable=not progress or None) as bar:
        for name, linear in chosen.items():
            moment, count, sample = observed[name]
            uniform = len(sample) - len(sample) // ops.LARGEST_SHARE
            rows = sample[: min(uniform, int(count))]
            weight = linear.weight.detach()
            for title, config in columns.items():
                solution = solve(
                    weight, config, moment=_as_shape(moment, moment_shape(config, weight.shape[1])), count=count,
                    sample=sample, name=name,
                )
                value, share = measure(rows, weight, solution, config)
                loss[name][title], relative[name][title] = float(value), float(share)
                bar.update()
    return LayerLosses(loss, relative)


def _observe(
    model: nn.Module, batches: list, linears: dict[str, nn.Linear], progress: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(moment fp32 [K, K], count int64 [], sample [SAMPLE_ROWS, K]) of every linear's input."""
    device = next(model.parameters()).device
    state, mask = {}, None
    for name, linear in linears.items():
        k, place = linear.in_features, linear.weight.device
        state[name] = (
            torch.zeros(k, k, device=place), torch.zeros((), dtype=torch.int64, device=place),
            torch.zeros(SAMPLE_ROWS, k, dtype=linear.weight.dtype, device=place),
        )

    def hook(name: str) -> Callable:
        def see(_, args: tuple) -> None:
            x = args[0]
            known = mask is not None and mask.shape == x.shape[:-1]
            torch.ops.wush.observe(x, mask if known else None, *state[name])
        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        with _inference([model]):
            for batch in tqdm(batches, desc="observe", unit="batch", disable=not progress or None):
                if isinstance(batch, dict):
                    inputs = {name: value.to(device) for name, value in batch.items()}
                    mask = inputs.get("attention_mask")
                    model(**inputs)
                else:
                    mask = None
                    model(*(value.to(device) for value in batch))
    finally:
        for handle in handles:
            handle.remove()
    return state


def _as_shape(moment: Tensor, shape: Sequence[int]) -> Tensor:
    """The full moment [K, K], or its diagonal blocks [K/B, B, B] if `shape` asks for them."""
    if len(shape) == 2:
        return moment
    blocks, size = shape[0], shape[-1]
    index = torch.arange(blocks, device=moment.device)
    return moment.view(blocks, size, blocks, size)[index, :, index]        # [K/B, B, B]


def _titles(configs: Sequence[WushConfig]) -> dict[str, WushConfig]:
    """Configurations by the settings they differ in."""
    settings = [config.to_dict() for config in configs]
    differing = [key for key in (settings[0] if settings else {}) if any(s[key] != settings[0][key] for s in settings)]
    titles = {" ".join(str(s[key]) for key in differing) or s["transform"]: c for s, c in zip(settings, configs, strict=True)}
    if len(titles) < len(settings):
        raise DataError("two columns of layer_loss are the same configuration: leave one out")
    return titles
