"""What `trial_frontier.py` puts in place of parts of the library: references in fp32 whose quantizer a row changes."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wush_compile import formats, modules
from wush_compile.calibration import loop, solve_group
from wush_compile.ops.core import block_transform
from wush_compile.passes.calibration import rewrite
from wush_compile.passes.calibration.linears import erase_unused, operands
from wush_compile.solver import choose, gptq, order, solve, transforms
from wush_compile.solver.transforms import round_transform

# NVFP4's scales as bytes above that of `absmax`. Of 12 on normal groups, whose amplitudes vary, the 3, 4 and 6 with the
# least error have .934, .900 and .878 of the error of a/6 or a/4; all have .872.
BYTES = {3: (0, -1, 5), 4: (0, -1, 4, 5), 6: (0, -1, 1, 4, 5, 6), 12: (0, -1, 1, 2, 3, 4, 5, 6, 7, -2, -3, -4)}


class Row(NamedTuple):
    """`power` is added to 1/2, that of s in T. steps: of feedback, 0 without. priced: candidates by its own loss."""

    steps: int = 0
    candidates: int = 0
    priced: bool = False
    tokens: int = 1
    rows: int = 1
    bias: bool = False
    order: bool = False
    power: float = 0.0
    spread: int = 0
    noise: float = 0.0
    learned: int = 0
    rate: float = 1e-3
    changes: dict = {}


ROW = Row()
GIVEN: dict[str, Tensor] = {}  # learned transforms by the names of their groups
FOUND: dict[str, Tensor] = {}  # what a solution has beside its buffers

# -- the quantizer of activations ------------------------------------------------------------------------------------


def rounder(scale: Tensor, format: str, g: Tensor | None) -> Callable[[Tensor], Tensor]:
    """scale [..] -> a function: x [.., n] -> the decoded values of its codes, in few launches."""
    unit = formats.decode_scales(scale, format)[..., None]
    unit = unit if g is None else unit / g
    inverse = 1 / unit
    return lambda x: gptq.round_e2m1(x * inverse).mul_(unit)


def feedback(cost: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """S̃ [b, B, B] -> (R, F): S̃ = RᵀR, R upper; F [b, B, B]: channels are rounded from x − F e of the errors behind."""
    size = cost.shape[-1]
    mean = cost.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
    wide = cost.double() / mean + 1e-4 * torch.eye(size, dtype=torch.float64, device=cost.device)
    root = torch.linalg.cholesky(wide).mT
    step = max(1, size // steps)
    behind = torch.arange(size, device=cost.device) // step
    own = root * (behind[:, None] == behind)  # its diagonal blocks
    taken = torch.linalg.solve_triangular(own, root, upper=True) * (behind[:, None] < behind)
    return root.float(), taken.float()


def with_feedback(x: Tensor, rounded: Callable[[Tensor], Tensor], taken: Tensor, step: int) -> Tensor:
    """x [b, n, B] -> the decoded values."""
    size, error = x.shape[-1], torch.zeros_like(x)
    for start in range(size - step, -1, -step):
        here, behind = slice(start, start + step), slice(start + step, size)
        z = x[..., here]
        if start + step < size:
            z = torch.baddbmm(z, error[..., behind], taken[:, here, behind].mT, alpha=-1)
        torch.sub(rounded(z), x[..., here], out=error[..., here])
    return x + error


def scales_of(x: Tensor, format: str, g: Tensor | None) -> Tensor:
    """Candidates [C, b, n] for x [b, n, G]."""
    if format == "mxfp4":
        return formats.scale_candidates(x, format, g)[: ROW.candidates]
    first = formats.compute_scales(x, format, "absmax", g).to(torch.int32)
    return torch.stack([(first + more).clamp(1, 0x7E) for more in BYTES[ROW.candidates]]).to(torch.uint8)


def quantized_groups(
    x: Tensor, format: str, rule: str, g: Tensor | None, root: Tensor | None, taken: Tensor | None
) -> Tensor:
    """x [b, n, G] -> the decoded values of its codes."""

    def of(scale: Tensor) -> Tensor:
        rounded = rounder(scale, format, g)
        if taken is None:
            return rounded(x)
        return with_feedback(x, rounded, taken, max(1, x.shape[-1] // ROW.steps))

    if not ROW.candidates:
        return of(formats.compute_scales(x, format, rule, g))
    best = least = None
    for scale in scales_of(x, format, g):
        values = of(scale)
        error = values - x
        if taken is not None and ROW.priced:
            error = error @ root.mT
        loss = error.square().sum(-1, keepdim=True)
        best, least = (
            (values, loss) if best is None else (torch.where(loss < least, values, best), torch.minimum(loss, least))
        )
    return best


def quantized(
    x: Tensor,
    transform: Tensor | None,
    g: Tensor | None,
    root: Tensor | None,
    taken: Tensor | None,
    format: str,
    rule: str,
) -> Tensor:
    """x [.., K] -> fp32 [.., K], what the product reads: decoded, with the token's factor taken back."""
    y = block_transform(x.flatten(0, -2), transform)
    best = least = None
    for factor in (2.0 ** (k / ROW.tokens) for k in range(ROW.tokens)):
        groups = (y * factor).unflatten(-1, (-1, formats.FORMATS[format].group_size)).transpose(0, 1).contiguous()
        values = quantized_groups(groups, format, rule, g, root, taken).transpose(0, 1).flatten(-2) / factor
        if ROW.tokens == 1:
            return values.view(x.shape)
        loss = (values - y).square().sum(-1, keepdim=True)
        best, least = (
            (values, loss) if best is None else (torch.where(loss < least, values, best), torch.minimum(loss, least))
        )
    return best.view(x.shape)


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    g: Tensor | None,
    factor: Tensor | None,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """x fp32 [.., K] times a weight's rows."""
    weight = formats.dequantize(codes, scales, format, g)
    y = torch.nn.functional.linear(x, weight if factor is None else weight / factor[:, None])
    return (y if bias is None else y + bias.float()).to(dtype)


# -- in graphs and modules -------------------------------------------------------------------------------------------

# What `quantized` reads, and what a product may read.
READ = ("input_transform", "input_global_scale", "root", "taken")
OPTIONAL = (*READ, "weight_global_scale", "bias", "factor")


def _rewrite(graph_module, group, solved, label: str) -> None:
    graph = graph_module.graph
    by_name = {n.name: n for n in graph.nodes}
    nodes = [by_name[m.node.name] for m in group.linears]
    source = operands(nodes[0])[0]
    graph_module.add_module(label, solved)
    present = {name for name, _ in solved.named_buffers(recurse=False)}

    def call(target, *args) -> object:
        return graph.call_function(target, args)

    with graph.inserting_before(nodes[0]):
        at = {name: graph.get_attr(f"{label}.{name}") if name in present else None for name in OPTIONAL}
        weight, scale = (graph.get_attr(f"{label}.{name}") for name in ("weight_packed", "weight_scale"))
        x = call(quantized, source, *(at[name] for name in READ), solved.operand, solved.scale_rule)
    for node, member in zip(nodes, solved.members, strict=True):

        def rows(buffer, member=member):
            return None if buffer is None else call(torch.ops.aten.slice.Tensor, buffer, 0, member.start, member.stop)

        with graph.inserting_before(node):
            dtype = node.meta["val"].dtype
            parts = rows(weight), rows(scale), at["weight_global_scale"], rows(at["factor"]), rows(at["bias"])
            new = call(product, x, *parts, solved.format, dtype)
        new.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
        node.replace_all_uses_with(new)
        erase_unused(graph, node)
    for name in list(graph.nodes):
        if name.op == "get_attr" and not name.users and name.target.startswith(label):
            graph.erase_node(name)


def quantize_input(group, x: Tensor) -> Tensor:
    """`quantized` by a group's buffers."""
    return quantized(x, *(getattr(group, name, None) for name in READ), group.operand, group.scale_rule)


def forward(self, x: Tensor, start: int, stop: int) -> Tensor:
    """`WushGroup.forward`; the members share what they read."""
    kept = self.__dict__.get("_kept")
    if kept is None or kept[0]() is not x or kept[1] != x._version:
        kept = [weakref.ref(x), x._version, quantize_input(self, x), len(self.members)]
    kept[3] -= 1
    self.__dict__["_kept"] = kept if kept[3] else None
    factor, bias = (None if (t := getattr(self, n, None)) is None else t[start:stop] for n in ("factor", "bias"))
    weight, scale = self.weight_packed[start:stop], self.weight_scale[start:stop]
    return product(kept[2], weight, scale, self.weight_global_scale, factor, bias, self.format, x.dtype)


def spread(size: int, steps: int) -> list[int]:
    """Which singular value each column of Had gets, such that what a step knows of the others is alike in all."""
    count = size // steps
    order = [0] * size
    for rank in range(size):
        tier, place = divmod(rank, count)
        order[tier * count + (place if tier % 2 == 0 else count - 1 - place)] = rank
    return order


def spread_transform(root: Tensor, gram: Tensor, *others) -> Tensor:
    """`wush_transform`, with the columns of Had in the order of `spread`."""
    t = transforms.wush_transform(root, gram, *others)
    if not ROW.spread:
        return t
    had = transforms.hadamard_matrix(t.shape[-1]).to(t.device)
    return had @ (had @ t)[:, spread(t.shape[-1], ROW.spread)]


# -- the solver ------------------------------------------------------------------------------------------------------


class Transforms(choose.Transforms):
    """Keeps S̃ = T⁻ᵀ S T⁻¹ of the blocks."""

    def _closed_form(self, roots: Tensor, gram: Tensor, blocks: slice) -> tuple[Tensor, Tensor]:
        if self.name in GIVEN:
            t, inverse = round_transform(GIVEN[self.name].double(), self.dtype, self.name)
        else:
            t, inverse = super()._closed_form(roots, gram, blocks)
        own = gram if self.sensitivity is None else self.sensitivity.instead_of(gram, blocks)
        FOUND["cost"] = (inverse.mT @ own @ inverse).float()
        return t, inverse


def shrink_(w: Tensor, unit: Tensor, diagonal: Tensor, block: int) -> None:
    """Makes of w [K, N] the weights that are best for inputs with rounding errors, ROW.noise of their block's mean
    power, and of the factor that of the moment with these errors."""
    root = unit.tril() * diagonal
    moment = root @ root.T
    mean = moment.diagonal().unflatten(0, (-1, block)).mean(-1, keepdim=True)
    noise = (ROW.noise * mean).expand(-1, block).flatten()
    moment.diagonal().add_(noise)
    root = torch.linalg.cholesky(moment)
    w.sub_(torch.cholesky_solve(noise[:, None] * w, root))
    diagonal.copy_(root.diagonal())
    unit.copy_(root / root.diagonal())


def gptq_of_best_factor(w: Tensor, unit: Tensor, diagonal: Tensor, format: str, rule: str, g: Tensor | None):
    """`gptq` of rows times their best factor, by which w is multiplied."""
    if ROW.noise:
        shrink_(w, unit, diagonal, formats.FORMATS[format].group_size)
    if ROW.rows == 1:
        return gptq.gptq(w, unit, diagonal, format, rule, g)
    factors, count = torch.tensor([2.0 ** (k / ROW.rows) for k in range(ROW.rows)], dtype=w.dtype), w.shape[1]
    every = factors.to(w.device).repeat_interleave(count)  # [F·N]
    codes, scales, error = gptq.gptq(w.repeat(1, ROW.rows) * every, unit, diagonal, format, rule, g)
    loss = (((unit.tril() * diagonal).T @ error) / every).square().sum(0).view(ROW.rows, count)
    at = loss.argmin(0) * count + torch.arange(count, device=w.device)
    FOUND["factor"] = every[at].float()
    w.mul_(every[at])
    return codes[at].contiguous(), scales[at].contiguous(), error[:, at].contiguous()


def order_of_blocks(recipe, h: Tensor) -> Tensor | None:
    """The library's, where a row asks for it."""
    return order.order_of_blocks(recipe, h) if ROW.order else None


def solve_one(group, tensors, seen):
    """`solve_group`, and what else a row needs."""
    FOUND.clear()
    sample = seen.sample[: len(seen.sample) * 7 // 8].clone() if ROW.bias else None  # its uniform part
    solved = solve_group.solve_group(group, tensors, seen)
    own = solved.group
    if ROW.steps:
        FOUND["root"], FOUND["taken"] = feedback(FOUND["cost"], ROW.steps)
    for name in FOUND.keys() & {"root", "taken", "factor"}:
        own.register_buffer(name, FOUND[name].contiguous())
    if sample is not None:
        x = sample[(sample != 0).any(-1)]
        weights = own.weight_packed, own.weight_scale, own.weight_global_scale, getattr(own, "factor", None), None
        y = product(quantize_input(own, x), *weights, own.format, torch.float32)
        mean = (x.float() @ group.stacked_weight(tensors).float().T - y).mean(0)
        own.bias = (mean if own.bias is None else own.bias.float() + mean).to(x.dtype)
    return solved


def patch() -> None:
    """Puts all of this into the library."""
    rewrite._rewrite = _rewrite
    modules.WushGroup.forward = forward
    choose.wush_transform = spread_transform
    solve.Transforms, solve.gptq, solve.order_of_blocks = Transforms, gptq_of_best_factor, order_of_blocks
    loop.solve_group = solve_one
