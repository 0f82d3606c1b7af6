"""Merges siblings: matmuls of one activation with row ranges of one buffer become one matmul and a split.

The members of a group share their buffers (q/k/v; gate/up). So no weight is concatenated or copied.
"""

import operator

import torch
from torch.fx import Graph, Node

from ..pattern import arguments, insert, insert_op, is_wush, op_name, refresh, replace, value

ROWS = ("weight_codes", "weight_scales", "weight_global_scale", "bias")


def _range(node: Node | None) -> tuple[Node, int, int] | None:
    """(base, start, stop) of a contiguous range of rows of `base`; None for anything else."""
    if op_name(node) != "slice":
        return None
    base, dim, start, stop, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])[:5]
    rows = value(base).shape[0]
    start, stop = start or 0, rows if stop is None else stop
    if node.kwargs or dim != 0 or step != 1 or not all(isinstance(v, int) for v in (rows, start, stop)):
        return None
    return base, start, min(stop, rows)


def _member(node: Node) -> tuple[tuple, tuple[int, int]] | None:
    """(arguments that siblings share, (first row, end) of this one); None if the call cannot have siblings."""
    named = arguments(node)
    if named["residual"] is not None:
        return None
    ranges = {name: _range(named[name]) for name in ROWS if named[name] is not None}
    if "weight_global_scale" in ranges and value(named["weight_global_scale"]).dtype == torch.float32:
        del ranges["weight_global_scale"]  # one for all rows
    if None in ranges.values() or len({r[1:] for r in ranges.values()}) != 1:
        return None
    bases = {name: r[0] for name, r in ranges.items()}
    common = tuple((name, bases.get(name, v)) for name, v in named.items())
    return common, ranges["weight_codes"][1:]


def _chain(members: list[tuple[int, int, Node]]) -> bool:
    """Whether members, sorted by first row, cover all rows of the base without a gap or an overlap."""
    stops = [0] + [stop for _, stop, _ in members]
    rows = value(_range(arguments(members[0][2])["weight_codes"])[0]).shape[0]
    return [start for start, _, _ in members] == stops[:-1] and stops[-1] == rows


def merge_siblings(graph: Graph) -> int:
    """One `wush::fp4_linear` for siblings that cover their group's buffer exactly; the number of matmuls removed."""
    siblings: dict[tuple, list] = {}
    for node in graph.nodes:
        if is_wush(node, "fp4_linear") and (found := _member(node)):
            common, (start, stop) = found
            siblings.setdefault(common, []).append((start, stop, node))
    removed, parted = 0, set()
    for common, members in siblings.items():
        first = members[0][2]  # first in the graph: all arguments are defined before it
        members = sorted(members, key=lambda m: m[0])
        if not _chain(members):
            continue
        *lead, _ = value(first).shape
        y = value(first).new_empty((*lead, members[-1][1]))  # [.., N]
        merged = insert_op(graph, first, "fp4_linear", dict(common), val=y)
        if len(members) > 1:
            sizes = [stop - start for start, stop, _ in members]
            split = insert(graph, first, torch.ops.aten.split_with_sizes.default, (merged, sizes, -1))
            parts = [insert(graph, first, operator.getitem, (split, i)) for i in range(len(members))]
        else:
            parts = [merged]
        for (_, _, node), part in zip(members, parts):
            part.meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
            replace(node, part)
        parted.update(parts)
        removed += len(members) - 1
    if parted:
        refresh(graph, parted)  # a part is a strided view; the matmul that it replaces was dense
    return removed
