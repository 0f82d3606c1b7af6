"""Heads whose weight is an embedding's too: in 8 bits the embedding looks up the rows of the quantized head.

An embedding whose forward does more than the lookup (Gemma's scales its rows) keeps its weight in 16 bits.
"""

from collections.abc import Iterable

from torch import fx, nn

from ...config import WushConfig
from ...formats import WEIGHT_FORMATS


def _looks_up(module: nn.Module) -> bool:
    return type(module).forward is nn.Embedding.forward and module.max_norm is None


def lookups(nodes: Iterable[fx.Node]) -> int:
    """How many of these nodes look rows up."""
    return sum("embedding" in getattr(node.target, "_opname", "") for node in nodes)


def embeddings_of(model: nn.Module, config: WushConfig, name: str, others: Iterable[str]) -> tuple[str, ...] | None:
    """The embeddings that can look up rows of the quantized linear `name`; None if the weight has to stay as it is.

    others   the other names of the linear's weight
    """
    modules = {other.rpartition(".")[0]: model.get_submodule(other.rpartition(".")[0]) for other in others}
    if config.recipe_of(name).format not in WEIGHT_FORMATS or not isinstance(model.get_submodule(name), nn.Linear):
        return None
    if not all(isinstance(module, nn.Embedding) for module in modules.values()):
        return None
    return tuple(path for path, module in modules.items() if _looks_up(module))
