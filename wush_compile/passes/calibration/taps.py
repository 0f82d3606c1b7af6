"""Taps behind the linears of a stage: in a backward pass they collect something of each row's gradient."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from ...solver.sensitivity import Sensitivity
from ...solver.solution import block_size
from .group import LinearGroup
from .linears import operands
from .observe import OBSERVERS
from .partition import Stage


class Tap(nn.Module):
    """Passes the outputs of a group's linears through, and gets the gradients of their rows: it sums their squares.

    anchor    a scalar that requires a gradient: with it a backward pass reaches the tap whatever is in front of it
    tensors   the stage's tensors by name
    width     how many sums a row has: [] or [R]
    """

    width: tuple[int, ...] = ()

    def __init__(self):
        super().__init__()
        self.anchor: Tensor | None = None
        self.tensors: dict[str, Tensor] = {}
        self._sums: Tensor | None = None
        self._kept: Tensor | None = None

    def forward(self, y: Tensor, mask: Tensor | None, x: Tensor, member: int) -> Tensor:
        """y [.., N], the output of member number `member`; mask: 0 where a row does not count, or None; x [.., K]."""
        if self._sums is None:
            self._sums = torch.zeros(*self.width, y.shape[:-1].numel(), dtype=torch.float32, device=y.device)
        if mask is not None:
            self._kept = mask.reshape(-1) != 0
        return _Passed.apply(y, self.anchor, self, x.detach(), member)

    def add(self, gradient: Tensor, x: Tensor, member: int) -> None:
        """Adds what a member's gradient [.., N] says. x [.., K]: its input."""
        self._sums += self.of_rows(gradient, x, member)

    def of_rows(self, gradient: Tensor, x: Tensor, member: int) -> Tensor:
        """What is summed over the members, for each row [.., rows]."""
        return torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32).flatten().square()

    def take(self) -> tuple[Tensor, int]:
        """Returns the sums of each row [.., rows], 0 in masked rows, and the number of the other rows; and resets."""
        sums, kept, self._sums, self._kept = self._sums, self._kept, None, None
        return (sums, sums.shape[-1]) if kept is None else (torch.where(kept, sums, 0), int(kept.sum()))


class SensitiveTap(Tap):
    """Also sums the gradients by the input, and takes what they say of its errors."""

    def __init__(self, group: LinearGroup):
        super().__init__()
        self.group, self.block = group, block_size(group.recipe, group.width)
        self._x: Tensor | None = None
        self._gradient: Tensor | None = None

    def of_rows(self, gradient: Tensor, x: Tensor, member: int) -> Tensor:
        linear = self.group.linears[member]
        weight = self.tensors[linear.weight].T if linear.transposed else self.tensors[linear.weight]
        back = (gradient @ weight).flatten(0, -2).to(torch.float32)  # Wᵀ g [n, K]
        self._gradient = back if self._gradient is None else self._gradient + back
        self._x = x.flatten(0, -2)
        return super().of_rows(gradient, x, member)

    def take(self) -> tuple[Tensor, int, Sensitivity | None]:
        """As `Tap`, and the sensitivity of the group's input; None if no gradient came."""
        x, gradient, kept = self._x, self._gradient, self._kept
        self._x = self._gradient = None
        if x is None:
            return (*super().take(), None)
        if kept is not None:
            x, gradient = (torch.where(kept[:, None], rows, 0) for rows in (x, gradient))
        sums, tokens = super().take()
        return sums, tokens, Sensitivity.of(x, gradient, tokens, self.block)


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, tap: Tap, x: Tensor, member: int) -> Tensor:
        ctx.tap, ctx.x, ctx.member = tap, x, member
        return y.clone()  # not a view: a model may add to it in place (Falcon)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.tap.add(gradient, ctx.x, ctx.member)
        return gradient, None, None, None, None


def tapped(
    stage: Stage, groups: list[LinearGroup | None], wanted: set[int], make: Callable[[int], Tap]
) -> tuple[fx.GraphModule, dict[int, Tap]]:
    """Returns a copy of a stage's graph, without observers and with a tap behind each linear of the wanted groups.

    The taps, `make(group number)`, are by group number. Their masks are those of the observers. The copy shares the
    stage's weights, by name.
    """
    group_of = {
        linear.node.name: (i, member)
        for i, group in enumerate(groups)
        if group and i in wanted
        for member, linear in enumerate(group.linears)
    }
    graph, copies, masks, taps = fx.Graph(), {}, {}, {}
    root = nn.Module()
    root.__dict__.update(stage.graph_module.__dict__)
    root._modules = dict(stage.graph_module._modules)
    for node in stage.graph_module.graph.nodes:
        if node.target in OBSERVERS:
            masks[node.meta["wush_group"]] = node.args[1]
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        # A stage that reads a linear's result has an input of the linear's name.
        if node.name in group_of and operands(node) is not None:
            index, member = group_of[node.name]
            name = f"wush_tap_{index}"
            if index not in taps:
                taps[index] = make(index)
                root.add_module(name, taps[index])
            mask = masks.get(index)
            source = copies[operands(node)[0]]
            copies[node] = graph.call_module(
                name, (copies[node], None if mask is None else copies[mask], source, member)
            )
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(root, graph), taps
