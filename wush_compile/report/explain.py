"""`explain`: what was quantized, how well, and what a layer's graph looks like before and after.

Graphs are derived anew from the model on every call, on the meta device: a stored copy would lie after a change.
"""

import io
import math

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from ..backend import preview
from ..capture.export import capture
from ..capture.meta import meta_copy
from ..checkpoint.record import quantization_of
from ..data import Batch
from ..errors import WushError, one_of
from ..graphs.printing import print_graph
from ..modules import WushLinear, named_groups
from ..passes.calibration.partition import Stage, partition


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of all quantized linears: packed codes, scales, transforms, biases."""
    return sum(group.nbytes() for _, group in named_groups(model))


def group_table(model: nn.Module, width: int = 120) -> str:
    """A table of the groups, worst relative loss first; groups loaded from a checkpoint have no losses."""
    record = quantization_of(model)
    groups = {group.members[0].name: group for _, group in named_groups(model)}

    def badness(name: str) -> float:
        loss = record.report.get(name, {}).get("relative_loss", -math.inf)
        return -loss

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading, justify in (
        ("group", "left"),
        ("N x K", "right"),
        ("block", "right"),
        ("tokens", "right"),
        ("loss", "right"),
        ("relative", "right"),
        ("KiB", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=heading != "group")
    for name in sorted(groups, key=badness):
        group, report = groups[name], record.report.get(name, {})
        first, *others = [m.name for m in group.members]
        label = first + "".join(f" + {other.rpartition('.')[2]}" for other in others)
        number = "{:.3e}".format
        table.add_row(
            label,
            f"{group.weight_packed.shape[0]} x {2 * group.weight_packed.shape[1]}",
            str(group.block_size),
            str(report.get("tokens", "")),
            number(report["loss"]) if "loss" in report else "",
            number(report["relative_loss"]) if "relative_loss" in report else "",
            f"{group.nbytes() / 1024:.1f}",
        )
    return _render(table, width)


def _render(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()).strip("\n")


def _before(model: nn.Module) -> nn.Module:
    """The model with plain linears where the quantized ones were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WushLinear):
            parent, _, leaf = name.rpartition(".")
            plain = nn.Linear(
                module.in_features, module.out_features, bias=module.has_bias, device="meta", dtype=_dtype(model)
            )
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _example(model: nn.Module) -> Batch:
    """Inputs to trace with: token ids for language models, rows of the first linear's width for others."""
    if getattr(model, "get_input_embeddings", None) is not None:
        return {"input_ids": torch.zeros((2, 8), dtype=torch.int64, device="meta")}
    first = next(m for m in model.modules() if isinstance(m, WushLinear))
    return (torch.zeros((2, first.in_features), dtype=_dtype(model), device="meta"),)


def layer_stages(model: nn.Module) -> tuple[list[Stage], list[Stage]]:
    """The stages of the model's forward before and after quantization, traced on the meta device."""
    example = _example(model)
    return tuple(
        partition(capture(net, [example]).graph_module) for net in (_before(meta_copy(model)), meta_copy(model))
    )


def _layer(stages: list[Stage]) -> Stage:
    """The first stage that is a repeated layer; the only one where there is none."""
    return next((s for s in stages if s.name not in ("inputs", "outputs")), stages[0])


def summary(model: nn.Module) -> str:
    """Three lines: the configuration, the memory, what was left alone."""
    record = quantization_of(model)
    groups = list(named_groups(model))
    linears = sum(len(group.members) for _, group in groups)
    settings = ", ".join(f"{k}={v}" for k, v in record.config.to_dict().items())
    weights = sum(2 * group.weight_packed.numel() for _, group in groups)
    per_weight = 8 * quantized_bytes(model) / max(1, weights)
    lines = [
        settings,
        f"{linears} linears in {len(groups)} groups: {quantized_bytes(model) / 2**20:.1f} MiB, "
        f"{per_weight:.2f} bits a weight with scales and transforms",
    ]
    lines += [f"not quantized: {name}: {reason}" for name, reason in record.ignored.items()]
    return "\n".join(lines)


def compiled_graph(model: nn.Module, layer: int = 0, after: str | None = None) -> str:
    """A decoder layer's graph inside the compile backend: after one pass, or without `after` before and after all."""

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=next(model.parameters()).device)

    example = _example(model)
    named = {"use_cache": False} | {k: real(v) for k, v in example.items()} if isinstance(example, dict) else {}
    positional = () if named else tuple(map(real, example))
    trace = preview(model, *positional, **named)
    if after is not None:
        one_of("pass", after, [snapshot.step for snapshot in trace.snapshots])
    return trace.text(after, layer)


def explain(model: nn.Module, view: str = "captured") -> str:
    """What `quantize` did: configuration, memory, what was skipped and why, a table of groups (worst first), and the graph
    of the first layer before and after: as captured, or (`view="compiled"`) as `torch.compile(backend="wush")` rewrites it.
    Raises `WushError` for a model that is not quantized."""
    text = [summary(model), group_table(model)]
    if one_of("view", view, ("captured", "compiled")) == "compiled":
        return "\n\n".join([*text, compiled_graph(model)])
    try:
        before, after = (_layer(stages) for stages in layer_stages(model))
    except WushError as error:
        text.append(f"(no graph: {error})")
    else:
        for when, stage in (("before", before), ("after", after)):
            text.append(f"{when}: {stage.name}({', '.join(stage.inputs)})\n{print_graph(stage.graph_module.graph)}")
    return "\n\n".join(text)
