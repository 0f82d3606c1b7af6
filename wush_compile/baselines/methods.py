"""The methods of the paper's Table 2 and more, each with the best settings that are known of it, in one harness.

A method may first rewrite the model (`prepare`), which then computes the same; after that all go through `quantize`,
its stages and its kernels, with the settings of `WushConfig` beside the format. Least squared error chooses the scales
of both sides wherever a method's authors search for scales or clipping.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..calibration.run import quantize
from ..config import WushConfig
from ..data import normalize
from ..errors import one_of
from .learn import learn_rotation
from .rotate import rotate
from .smooth import smooth

PREPARATIONS = (None, "smooth", "rotate", "learn")
# How much of the range SmoothQuant moves: its authors' default.
SMOOTH_ALPHA = 0.5


@dataclass(frozen=True)
class Method:
    """A row of a table.

    source   the publication
    formats  the formats that it is defined for
    prepare  the rewrite that comes first: `smooth` (SmoothQuant), `rotate` (QuaRot), `learn` (SpinQuant), or None
    """

    title: str
    source: str
    settings: dict = field(default_factory=dict)
    prepare: str | None = None
    formats: tuple[str, ...] = ("mxfp4", "nvfp4")
    alpha: float = SMOOTH_ALPHA

    def configuration(self, format: str, seed: int = 0) -> WushConfig:
        return WushConfig(format=format, seed=seed, **self.settings)


_EQUAL = {"token_weights": "uniform", "sweeps": 0, "correction": 0.0}
_ABSMAX = {"weight_scale_rule": "absmax", "activation_scale_rule": "absmax"}
_MSE = {"weight_scale_rule": "mse", "activation_scale_rule": "mse"}
# Conditional moments leave channels in the model's order, as published.
_RTN, _GPTQ = {**_EQUAL, "solver": "rtn"}, {**_EQUAL, "solver": "gptq", "moments": "conditional"}
_IDENTITY, _HADAMARD = {"transform": "identity"}, {"transform": "hadamard"}
_PAPER = {"weight_scale_rule": "paper", "activation_scale_rule": "paper", "moments": "conditional"}
_PAPER_WUSH = {**_PAPER, "activation_rounding": "nearest", "share_transform": False}

METHODS = {
    "rtn": Method("RTN", "", {**_RTN, **_ABSMAX, **_IDENTITY}),
    "rtn-hadamard": Method("RTN, Hadamard blocks", "arXiv 2509.23202", {**_RTN, **_ABSMAX, **_HADAMARD}),
    "four-over-six": Method(
        "Four Over Six: RTN, scales to 6 or 4", "arXiv 2512.02010", {**_RTN, **_MSE, **_IDENTITY}, formats=("nvfp4",)
    ),
    "smoothquant": Method("SmoothQuant, RTN", "arXiv 2211.10438", {**_RTN, **_MSE, **_IDENTITY}, "smooth"),
    "smoothquant-gptq": Method("SmoothQuant, GPTQ", "arXiv 2211.10438", {**_GPTQ, **_MSE, **_IDENTITY}, "smooth"),
    "quarot-rtn": Method("QuaRot, RTN", "arXiv 2404.00456", {**_RTN, **_MSE, **_IDENTITY}, "rotate"),
    "quarot": Method("QuaRot, GPTQ", "arXiv 2404.00456", {**_GPTQ, **_MSE, **_IDENTITY}, "rotate"),
    "spinquant": Method("SpinQuant, GPTQ", "arXiv 2405.16406", {**_GPTQ, **_MSE, **_IDENTITY}, "learn"),
    "gptq": Method("GPTQ", "arXiv 2210.17323", {**_GPTQ, **_MSE, **_IDENTITY}),
    "gptq-hadamard": Method("MR-GPTQ: GPTQ, Hadamard blocks", "arXiv 2509.23202", {**_GPTQ, **_MSE, **_HADAMARD}),
    "rtn-wush": Method("WUSH, RTN, as published", "arXiv 2512.00956", {**_RTN, **_PAPER_WUSH}),
    "gptq-wush": Method("WUSH, GPTQ, as published", "arXiv 2512.00956", {**_GPTQ, **_PAPER_WUSH}),
    "default": Method("our default", ""),
}


def prepare(
    model: nn.Module,
    data: Iterable | None,
    method: Method,
    format: str,
    seed: int = 0,
    tokenizer=None,
    progress: bool = True,
) -> nn.Module:
    """Rewrites a model in place as a method asks for; it computes the same up to rounding."""
    if one_of("preparation", method.prepare, PREPARATIONS) == "smooth":
        smooth(model, data, method.alpha, tokenizer=tokenizer)
    elif method.prepare == "rotate":
        rotate(model, normalize(data, tokenizer, model)[:1], seed=seed)
    elif method.prepare == "learn":
        batches = normalize(data, tokenizer, model)
        learned = learn_rotation(model, batches, format, seed=seed, progress=progress)
        rotate(model, batches[:1], learned)
    return model


def quantize_by(
    name: str,
    model: nn.Module,
    data: Iterable | None,
    format: str,
    *,
    seed: int = 0,
    tokenizer=None,
    progress: bool = True,
) -> nn.Module:
    """Quantizes a model in place by one of `METHODS`. Arguments are those of `quantize`; `seed` is the random one's."""
    method = METHODS[one_of("method", name, METHODS)]
    one_of(f"format of {name}", format, method.formats)
    prepare(model, data, method, format, seed, tokenizer, progress)
    return quantize(model, data, method.configuration(format, seed), tokenizer=tokenizer, progress=progress)
