"""Common subexpressions: the ops are pure, so equal calls become one call.

AOTAutograd does not merge custom ops in inference graphs: q, k and v each arrive with a quantizer of their own.
"""

import operator

from torch.fx import Graph

from ..pattern import freeze, is_wush, replace


def cse(graph: Graph) -> int:
    """Merges equal calls of wush ops (and the getitems on them); the number of calls removed."""
    seen, removed = {}, 0
    for node in list(graph.nodes):
        result = node.target is operator.getitem and is_wush(node.args[0])
        if not result and (not is_wush(node) or node.target._schema.is_mutable):
            continue
        first = seen.setdefault((node.target, freeze(node.args), freeze(node.kwargs)), node)
        if first is not node:
            replace(node, first)
            removed += not result
    return removed
