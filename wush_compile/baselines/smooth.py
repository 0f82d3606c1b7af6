"""SmoothQuant (Xiao et al., 2023): moves the range of activations into the weights, channel by channel.

The channels of the input of linears behind a norm are divided by s_j = max|X_j|^α / max|W_j|^(1−α), which goes into the
norm's weight, and the weights are multiplied by it. max|W_j| is over all linears that read the norm. As in the authors'
library, inputs that no norm precedes (o_proj, down_proj) stay.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import DEFAULT_IGNORE, ignored_by
from ..data import normalize
from ..evaluation.language import inference_mode
from .stream import find_norms, traced

LEAST = 1e-5


def smooth(
    model: nn.Module, data: Iterable, alpha: float = 0.5, ignore: Iterable[str] = DEFAULT_IGNORE, tokenizer=None
) -> int:
    """Smooths a model in place; it computes the same up to rounding. Returns how many norms took part.

    alpha: how much of the range moves. The authors take .5, and .8 to .9 for Llama. ignore: linears that will not be
    quantized (patterns of `WushConfig.ignore`); a norm in front of one stays.
    """
    batches = normalize(data, tokenizer, model)
    norms = [
        n
        for n in find_norms(traced(model, batches))
        if n.weight is not None and not any(ignored_by(r, ignore) for r in n.readers)
    ]
    largest = _largest_inputs(model, batches, [n.readers[0] for n in norms])
    for norm in norms:
        linears = [model.get_submodule(name) for name in norm.readers]
        weight = torch.stack([m.weight.detach().abs().amax(0) for m in linears]).amax(0).double().clamp(min=LEAST)
        inputs = largest[norm.readers[0]].double()
        scale = (inputs.pow(alpha) / weight.pow(1 - alpha)).clamp(min=LEAST)  # s [K]
        _change(model, norm.weight, lambda w: (w + norm.offset) / scale - norm.offset)
        if norm.bias is not None:
            _change(model, norm.bias, lambda b: b / scale)
        for linear in linears:
            linear.weight.data = (linear.weight.detach().double() * scale).to(linear.weight.dtype)
    return len(norms)


def _change(model: nn.Module, name: str, change) -> None:
    parameter = model.get_parameter(name)
    parameter.data = change(parameter.detach().double()).to(parameter.dtype)


def _largest_inputs(model: nn.Module, batches: list, names: list[str]) -> dict[str, Tensor]:
    """The largest magnitude of each channel of the inputs of linears: [K] by name."""
    found: dict[str, Tensor] = {}

    def hook(name: str):
        def see(_, args: tuple) -> None:
            most = args[0].detach().abs().flatten(0, -2).amax(0).to(torch.float32)
            found[name] = torch.maximum(found[name], most) if name in found else most

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    device = next(model.parameters()).device
    try:
        with inference_mode([model]):
            for batch in batches:
                if isinstance(batch, dict):
                    model(**{key: value.to(device) for key, value in batch.items()})
                else:
                    model(*(value.to(device) for value in batch))
    finally:
        for handle in handles:
            handle.remove()
    return found
