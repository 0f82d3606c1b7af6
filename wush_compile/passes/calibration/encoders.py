"""Finds the encoders in front of a language model, by dataflow. They stay in 16 bits unless the user asks for them."""

from collections.abc import Iterable

from torch import Tensor, fx

from ...config import Names, matches
from .dataflow import depend_on
from .linears import operands


def encoders_beside_tokens(graph: fx.Graph) -> dict[fx.Node, str]:
    """Returns the nodes of encoders in front of a language model, each with the input that it encodes (`pixel_values`).

    Such a node depends on a floating-point input and on no token, and the model has linears that depend on both. So
    neither the text and the image side of CLIP is one, nor the encoder of an encoder-decoder.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    tokens = depend_on(graph, [n for n in inputs if n.target in ("input_ids", "inputs_embeds")])
    found: dict[fx.Node, str] = {}
    for node in inputs if tokens else ():
        value = node.meta.get("val")
        if node in tokens or not isinstance(value, Tensor) or not value.is_floating_point() or "mask" in node.name:
            continue
        after = depend_on(graph, [node])
        weighted = (one for one in after & tokens if (given := operands(one)) and given[1].op == "get_attr")
        if next(weighted, None) is not None:
            found |= dict.fromkeys(after - tokens, node.name)
    return found


def asked_for(name: Names, patterns: Iterable[str]) -> bool:
    """Tells whether the last pattern of `ignore` that matches a name begins with `!`."""
    found = [pattern for pattern in patterns if matches(name, pattern.removeprefix("!"))]
    return bool(found) and found[-1].startswith("!")


def encodes(name: str, what: str) -> str:
    """Returns the reason for a linear in an encoder of another input than tokens."""
    parts = name.split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    pattern = "!" + ".".join([*parts[:depth], "*"] if depth else parts)
    return f"encodes {what}, which stays in 16 bits by default: ignore=({pattern!r},) quantizes it"
