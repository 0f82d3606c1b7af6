"""Replaces the linears of a group: their input is quantized once, and each linear becomes one FP4 matmul.

A product of experts becomes one grouped FP4 matmul. Where its rows are copies of tokens, tokens are quantized, and the
matmul reads them by the index of each row's token.
"""

import operator
from collections.abc import Iterable

import torch
from torch import fx

from ...experts import DEFAULTS
from ...modules import WushGroup, feedback_arguments
from .experts import products
from .group import LinearGroup
from .linears import erase_unused, operands

aten, wush = torch.ops.aten, torch.ops.wush


def rewrite(graph_module: fx.GraphModule, groups: Iterable[tuple[LinearGroup, WushGroup, str]]) -> None:
    """Rewrites groups in a stage's graph.

    groups   (group, its solved module, the name that this module gets as a submodule) of each

    The matmuls read row ranges of the group's buffers, exactly as the installed modules do. The nodes of the old
    weights are erased.
    """
    for group, solved, label in groups:
        _rewrite(graph_module, group, solved, label)
    graph_module.graph.lint()
    graph_module.recompile()


def _rewrite(graph_module: fx.GraphModule, group: LinearGroup, solved: WushGroup, label: str) -> None:
    graph = graph_module.graph
    by_name = {n.name: n for n in graph.nodes}
    nodes = [by_name[m.node.name] for m in group.linears]
    product = None if group.experts is None else products(graph)[nodes[0]]
    # May be a quantized linear by now, under another name.
    source = operands(nodes[0])[0] if product is None else product.source
    graph_module.add_module(label, solved)

    def call(target, *args: object) -> fx.Node:
        return graph.call_function(target, args)

    with graph.inserting_before(nodes[0]):
        present = {name for name, _ in solved.named_buffers(recurse=False)}
        weight, weight_scale, weight_global, transform, input_global, feedback, bias = (
            graph.get_attr(f"{label}.{name}") if name in present else None
            for name in (
                "weight_packed",
                "weight_scale",
                "weight_global_scale",
                "input_transform",
                "input_global_scale",
                "input_feedback",
                "bias",
            )
        )
        quantized = call(
            wush.transform_quantize.default,
            source,
            transform,
            input_global,
            solved.operand,
            solved.scale_rule,
            *feedback_arguments(feedback),
        )
        codes, scales = call(operator.getitem, quantized, 0), call(operator.getitem, quantized, 1)

    for node, member in zip(nodes, solved.members, strict=True):

        def rows(buffer: fx.Node, member=member) -> fx.Node:
            return buffer if len(nodes) == 1 else call(aten.slice.Tensor, buffer, 0, member.start, member.stop)

        with graph.inserting_before(node):
            new = call(
                wush.fp4_linear.default if product is None else wush.fp4_grouped_linear.default,
                codes,
                scales,
                input_global,
                rows(weight),
                rows(weight_scale),
                rows(weight_global) if solved.recipe.factors_rows and product is None else weight_global,
                *((None if bias is None else rows(bias), None) if product is None else (product.offs, bias)),
                solved.format,
                node.meta["val"].dtype,
                *(solved.layout if product is None else (*(solved.layout or DEFAULTS), product.token)),
            )
        new.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
        node.replace_all_uses_with(new)
        erase_unused(graph, node)
