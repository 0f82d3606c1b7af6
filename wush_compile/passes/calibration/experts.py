"""Finds the products of experts in a graph by dataflow: grouped matmuls whose weight is a 3-D parameter.

    y = grouped_mm(x, weight or its transpose, offs)          rows x in the order of experts, int32 offs [E]
    y = y + bias[expert]                                      where the experts have biases
    x = tokens[token]                                         where rows are copies of tokens

`aten._grouped_mm` computes it, or `transformers.grouped_mm_fallback` for dtypes and strides that the op does not take.
A linear from which the offsets follow is a router. It stays in 16 bits, as does a linear with one output channel that
gates a shared expert.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ...experts import is_experts, products_of
from .linears import operands

aten = torch.ops.aten
# Names, because the second is defined by transformers, which passes do not import.
PRODUCTS = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
CASTS = (aten.to.dtype, aten._to_copy.default)
ADDS = (aten.add.Tensor, aten.add_.Tensor)
ROUTER = "routes tokens to experts, which stays in 16 bits"
SWAPPED = ((-2, -1), (-1, -2), (1, 2), (2, 1))


class Product(NamedTuple):
    """The operands of a product of experts.

    rows        [S, K], in the order of experts
    source      the tokens [T, K] that rows are copies of, or the rows themselves
    token       int64 [S], which token a row is a copy of; None if the rows are no copies
    weight      the parameter [E, N, K], or [E, K, N] if `transposed`
    bias        the parameter [E, N], or None
    offs        int32 [E]
    """

    rows: fx.Node
    source: fx.Node
    token: fx.Node | None
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    offs: fx.Node


def _unwrapped(node: fx.Node) -> fx.Node:
    """A node without casts to the dtype that it has."""
    while node.target in CASTS and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
        node = node.args[0]
    return node


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node, without assertions about it."""
    return [u for u in node.users if not str(u.target).startswith("aten._assert")]


def is_product(node: fx.Node) -> bool:
    """Whether a node is a grouped matmul."""
    return node.op == "call_function" and str(node.target) in PRODUCTS


def _bias_of(product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the add behind a product, the parameter that it adds the rows of); None without a bias."""
    users = _readers(product)
    if len(users) != 1 or users[0].target not in ADDS or users[0].kwargs or len(users[0].args) != 2:
        return None
    other = next((a for a in users[0].args if a is not product), None)
    if getattr(other, "target", None) is not aten.index.Tensor or len(other.args[1]) != 1:
        return None
    bias = other.args[0]
    return (users[0], bias) if bias.op == "get_attr" and bias.meta["val"].dim() == 2 else None


def product_of(node: fx.Node) -> tuple[fx.Node, Product] | None:
    """(the last node of a product of experts, its operands), from its grouped matmul; None for any other node."""
    if not is_product(node) or node.kwargs or len(node.args) != 3:
        return None
    given, weight, offs = node.args
    transposed = weight.op == "get_attr"
    if weight.target is aten.transpose.int and tuple(weight.args[1:]) in SWAPPED:
        weight = weight.args[0]
    if weight.op != "get_attr":
        return None
    rows = source = _unwrapped(given)
    token = None
    if rows.target is aten.index.Tensor and len(rows.args[1]) == 1 and rows.args[0].meta["val"].dim() == 2:
        source, [token] = rows.args
    added = _bias_of(node)
    last, bias = added or (node, None)
    return last, Product(rows, source, token, weight, bias, transposed, offs)


def products(graph: fx.Graph) -> dict[fx.Node, Product]:
    """The products of experts of a graph by their last nodes, in the graph's order."""
    return dict(found for node in graph.nodes if (found := product_of(node)) is not None)


def routers(found: Iterable[Product]) -> set[fx.Node]:
    """The linears from which the offsets of products follow, with no linear in between."""
    left, seen, linears = [product.offs for product in found], set(), set()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if operands(node) is not None:
            linears.add(node)
        elif isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            left += node.all_input_nodes
    return linears


def left_in_16_bits(node: fx.Node, name: str, rows: int, routing: set[fx.Node], experts: Iterable[str]) -> str | None:
    """Why a linear beside experts, of these modules, is not quantized; None if it can be."""
    if node in routing:
        return ROUTER
    beside = {path.rpartition(".")[0] for path in experts}
    if rows == 1 and name.rpartition(".")[0] in beside:
        return "gates a shared expert, which stays in 16 bits"
    return None


def cannot_replace(name: str, called: str, product: Product, model: nn.Module, uses: Mapping[str, int]) -> str | None:
    """Why a product's module cannot compute it with a quantized weight; None if it can.

    name     the weight. called: the module whose forward computes the product. uses: how often parameters are read
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kind = type(module).__name__
    if not is_experts(module) or leaf not in products_of(module):
        return f"3-D weight of {kind}, which does not follow the interface of transformers' experts"
    if called != path:
        return f"3-D weight of {kind}, which another module multiplies"
    if uses.get(name, 0) > 1:
        return f"applied {uses[name]} times in one forward"
    if bool(module.has_bias) != (product.bias is not None):
        return f"the biases of {kind} are not added right behind the product"
    return None
