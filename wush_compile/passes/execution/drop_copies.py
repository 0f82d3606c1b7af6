"""Removes quantizers that only copy: activations of 16 bits without a transform, in front of weights of 8 bits.

    codes, scales = transform_quantize(x, None, None, "none", "none")  ->  x, an empty tensor

It runs behind `cse`, so that siblings still read the same two nodes, and before the fusions, so that no norm is fused
with a copy.
"""

import operator

import torch
from torch.fx import Graph, Node

from ..pattern import arguments, insert, is_wush, replace

aten = torch.ops.aten


def _copies(node: Node) -> bool:
    named = arguments(node)
    return named["format"] == "none" and named["transform"] is None


def drop_copies(graph: Graph) -> int:
    """Replaces each quantizer that only copies by its input; the number replaced."""
    dropped = 0
    for node in list(graph.nodes):
        if not is_wush(node, "transform_quantize") or not _copies(node):
            continue
        x = arguments(node)["x"]
        for part in list(node.users):
            if part.target is operator.getitem and part.args[1] == 0:
                replace(part, x)
            elif part.target is operator.getitem:
                empty = insert(graph, part, aten.slice.Tensor, (x, -1, 0, 0))
                replace(part, insert(graph, part, torch.ops.prims.convert_element_type.default, (empty, torch.float32)))
        dropped += 1
    return dropped
