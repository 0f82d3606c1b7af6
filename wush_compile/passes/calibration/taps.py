"""Taps behind the linears of a stage: in a backward pass they collect the norm of each row's gradient."""

import torch
from torch import Tensor, fx, nn

from .group import LinearGroup
from .observe import OBSERVERS
from .partition import Stage


class Tap(nn.Module):
    """Passes the outputs of a group's linears through, and collects the gradients of their rows.

    anchor   a scalar that requires a gradient: with it a backward pass reaches the tap whatever is in front of it
    """

    def __init__(self):
        super().__init__()
        self.anchor: Tensor | None = None
        self._square: Tensor | None = None
        self._kept: Tensor | None = None
        self._effect: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [.., N], the output of one member; mask: 0 where a row does not count, or None."""
        if self._square is None:
            self._square = torch.zeros(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
            self._effect = torch.zeros_like(self._square)
        if mask is not None:
            self._kept = mask.reshape(-1) != 0
        return _Passed.apply(x, self.anchor, self)

    def add(self, gradient: Tensor, size: Tensor) -> None:
        """Adds a member's gradient [.., N]; size [..]: the norm of each row of its output."""
        square = _row_norms(gradient).flatten().square()
        self._square += square
        self._effect += square * size.flatten().square() / gradient.shape[-1]

    def take(self) -> tuple[Tensor, int, Tensor]:
        """Returns what was collected, and resets.

        (each row's norm over all members [rows], 0 in masked rows; the number of the other rows; each row's sum over
        members of ‖gradient‖² ‖output‖² / N, see `survey.py`)
        """
        norm, rows = self._square.sqrt(), len(self._square)
        if self._kept is not None:
            norm, rows = torch.where(self._kept, norm, 0.0), int(self._kept.sum())
        effect = self._effect
        self._square = self._kept = self._effect = None
        return norm, rows, effect


def _row_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)


class _Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, tap: Tap) -> Tensor:
        ctx.tap, ctx.size = tap, _row_norms(x)
        return x.clone()  # not a view: a model may add to it in place (Falcon)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        ctx.tap.add(gradient, ctx.size)
        return gradient, None, None


def tapped(stage: Stage, groups: list[LinearGroup | None], wanted: set[int]) -> tuple[fx.GraphModule, dict[int, Tap]]:
    """Returns a copy of a stage's graph, without observers and with a tap behind each linear of the wanted groups.

    The taps are by group number. Their masks are those of the observers. The copy shares the stage's weights, by name.
    """
    group_of = {
        linear.node.name: i for i, group in enumerate(groups) if group and i in wanted for linear in group.linears
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
        if node.name in group_of:
            index = group_of[node.name]
            name = f"wush_tap_{index}"
            if index not in taps:
                taps[index] = Tap()
                root.add_module(name, taps[index])
            mask = masks.get(index)
            copies[node] = graph.call_module(name, (copies[node], None if mask is None else copies[mask]))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(root, graph), taps
