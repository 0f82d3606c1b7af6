"""Losses of single layers of the unquantized model, solved with several configurations (docs/spec.md §5)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import WushConfig
from ..data import normalize
from ..errors import DataError, one_of
from ..ops import core as ops
from ..solver.loss import layer_loss
from ..solver.solution import moment_shape
from ..solver.solve import solve
from .language import inference_mode

# Rows kept of a layer's input. `wush::observe` fills a share of them with the rows of largest norm, and the others,
# from which losses come, with a uniform sample.
LOSS_SAMPLE_ROWS = 8192


@dataclass(frozen=True)
class LayerLosses:
    """Losses by layer and column.

    `loss[layer][column]` is ‖X Wᵀ − Q(X Tᵀ) Q(W T⁻¹)ᵀ‖² / (n N) (eq. 1, 4). `relative` divides it by ‖X Wᵀ‖² / (n N).
    """

    loss: dict[str, dict[str, float]]
    relative: dict[str, dict[str, float]]

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        """The relative losses in percent, as a Markdown table: layers in rows, configurations in columns."""
        columns = list(next(iter(self.relative.values())))
        lines = [f"| relative loss, % | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for layer, row in self.relative.items():
            lines.append(f"| {layer} | " + " | ".join(f"{100 * row[c]:.3g}" for c in columns) + " |")
        return "\n".join(lines)


def compare_layers(
    model: nn.Module,
    data: Iterable,
    layers: Sequence[str],
    configs: Sequence[WushConfig] | Mapping[str, WushConfig],
    *,
    tokenizer=None,
    progress: bool = True,
) -> LayerLosses:
    """Losses of single linears of the unquantized `model`. Each is solved alone with every configuration (eq. 1, 4).

    layers
        Names of `nn.Linear` modules. Their inputs are observed while `model` runs over `data` once.
    configs
        The columns: a mapping from titles to configurations, or a sequence of configurations, which are titled by the
        settings in which they differ.

    Moments come from all positions whose mask is not 0. Losses come from a uniform sample of at most 7168 of them.
    """
    columns = dict(configs) if isinstance(configs, Mapping) else _titles(configs)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = {name: linears[one_of("linear layer", name, linears)] for name in layers}
    if not chosen or not columns:
        raise DataError("compare_layers needs at least one layer and one configuration: give layers and configs")
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
                    weight,
                    config,
                    moment=_as_shape(moment, moment_shape(config, weight.shape[1])),
                    count=count,
                    sample=sample,
                    name=name,
                )
                value, share = layer_loss(rows, weight, solution, config)
                loss[name][title], relative[name][title] = float(value), float(share)
                bar.update()
    return LayerLosses(loss, relative)


def _observe(
    model: nn.Module, batches: list, linears: dict[str, nn.Linear], progress: bool
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(moment fp32 [K, K], count int64 [], sample [LOSS_SAMPLE_ROWS, K]) of every linear's input."""
    device = next(model.parameters()).device
    state, mask = {}, None
    for name, linear in linears.items():
        k, place = linear.in_features, linear.weight.device
        state[name] = (
            torch.zeros(k, k, device=place),
            torch.zeros((), dtype=torch.int64, device=place),
            torch.zeros(LOSS_SAMPLE_ROWS, k, dtype=linear.weight.dtype, device=place),
        )

    def hook(name: str) -> Callable:
        def see(_, args: tuple) -> None:
            x = args[0]
            known = mask is not None and mask.shape == x.shape[:-1]
            torch.ops.wush.observe(x, mask if known else None, *state[name])

        return see

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        with inference_mode([model]):
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
    """The moment [K, K], or its diagonal blocks [K/B, B, B] if `shape` is theirs."""
    if len(shape) == 2:
        return moment
    blocks, size = shape[0], shape[-1]
    index = torch.arange(blocks, device=moment.device)
    return moment.view(blocks, size, blocks, size)[index, :, index]  # [K/B, B, B]


def _titles(configs: Sequence[WushConfig]) -> dict[str, WushConfig]:
    """Configurations, titled by the settings in which they differ."""
    settings = [config.to_dict() for config in configs]
    differing = [key for key in (settings[0] if settings else {}) if any(s[key] != settings[0][key] for s in settings)]
    titles = {
        " ".join(str(s[key]) for key in differing) or s["transform"]: c for s, c in zip(settings, configs, strict=True)
    }
    if len(titles) < len(settings):
        raise DataError("two columns of compare_layers are the same configuration: leave one out")
    return titles
