"""A quantized model in a few lines: settings, memory, and what was left alone."""

import itertools
import textwrap
from collections import Counter

import torch
from torch import nn

from ..checkpoint.record import quantization_of
from ..config import WushConfig
from ..experts import ExpertGroup
from ..modules import WushGroup, named_groups

# Settings that a summary always names; of the others only those that are not the default.
ALWAYS = ("format", "transform", "solver")
PARTS = {  # all others are scales, but for factors of rows
    "weight_packed": "codes",
    "input_transform": "transforms",
    "input_feedback": "feedback",
    "bias": "biases",
}
NAMES = 3
WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}


def quantized_bytes(model: nn.Module) -> int:
    """Bytes of all quantized linears: packed codes, scales, transforms, biases."""
    return sum(group.nbytes() for _, group in named_groups(model))


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the first floating-point parameter; fp32 where a model has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _plain_bytes(group: WushGroup, dtype: torch.dtype) -> int:
    """Bytes of a group's linears before quantization. Transforms and biases keep the dtype of the weights."""
    dtype = next((b.dtype for b in (group.input_transform, group.bias) if b is not None), dtype)
    width, experts = group.shape[-1], group.shape[0] if isinstance(group, ExpertGroup) else 1
    return dtype.itemsize * experts * sum((m.stop - m.start) * (width + m.has_bias) for m in group.members)


def counted(model: nn.Module) -> str:
    """What is quantized, in words: `98 linears and 48 products of experts`."""
    groups = [group for _, group in named_groups(model)]
    products = sum(isinstance(group, ExpertGroup) for group in groups)
    linears = f"{sum(len(group.members) for group in groups) - products} linears"
    return f"{linears} and {products} products of experts" if products else linears


def model_bytes(model: nn.Module) -> tuple[int, int]:
    """(before, after): bytes of all parameters and buffers, of the original model and of the quantized one."""
    tensors = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    after = sum(t.numel() * t.element_size() for t in tensors.values())
    dtype = model_dtype(model)
    plain = sum(_plain_bytes(group, dtype) for _, group in named_groups(model))
    return after - quantized_bytes(model) + plain, after


def bits_per_weight(model: nn.Module) -> str:
    """`4.63 bits a weight (4 codes, 0.25 scales, ..)`: all that is stored for the linears, over their weights."""
    weights, bits = 0, Counter()
    for _, group in named_groups(model):
        weights += group.weight_packed.shape[0] * group.width
        for name, buffer in group.named_buffers():
            by_row = name == "weight_global_scale" and buffer.dtype == torch.bfloat16
            bits["factors of rows" if by_row else PARTS.get(name, "scales")] += (
                8 * buffer.numel() * buffer.element_size()
            )
    parts = ", ".join(f"{count / weights:.3g} {part}" for part, count in bits.items())
    return f"{bits.total() / weights:.2f} bits a weight ({parts})"


def settings_text(config: WushConfig, everything: bool = False) -> str:
    """Settings as `name=value`: those that are always named, and those that differ from their defaults (or all)."""
    default, settings = WushConfig().to_dict(), config.to_dict()
    shown = {k: v for k, v in settings.items() if everything or k in ALWAYS or v != default[k]}
    return ", ".join(f"{name}={_text(value)}" for name, value in shown.items())


def _text(value: object) -> str:
    """A setting as it is given on the command line: lists in parentheses, overrides as `PATTERN:NAME=VALUE`."""
    if isinstance(value, dict):
        return ",".join(f"{name}={v}" for name, v in value.items())
    if isinstance(value, list):
        return f"({' '.join(':'.join(map(_text, v)) if isinstance(v, list) else str(v) for v in value)})"
    return str(value)


def by_reason(ignored: dict[str, str]) -> dict[str, list[str]]:
    """Why modules were not quantized -> their names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in ignored.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _skipped(ignored: dict[str, str], everything: bool) -> list[str]:
    """A line for each reason, with the number of modules and their first names (or all)."""
    lines = []
    for reason, names in by_reason(ignored).items():
        shown = names if everything else names[:NAMES]
        more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
        lines.append(f"  {len(names)}: {reason}: {', '.join(shown)}{more}")
    return lines


def summary(model: nn.Module, everything: bool = False, width: int = 120) -> str:
    """Settings, groups, memory, calibration, and what was not quantized, by reason, in lines of `width` columns.

    everything: also the settings that have their defaults, and the names of all modules that were not quantized.
    """
    record, groups = quantization_of(model), [group for _, group in named_groups(model)]
    before, after = model_bytes(model)
    lines = [
        f"settings: {settings_text(record.config, everything)}",
        f"quantized: {counted(model)} in {len(groups)} groups, {quantized_bytes(model) / 2**20:.1f} MiB, "
        f"{bits_per_weight(model)}",
        f"model: {before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB now",
    ]
    if reports := list(record.report.values()):
        tokens = max(report.get("tokens", 0) for report in reports)
        seconds = sum(report.get("seconds", 0) for report in reports)
        text = (record.run or {}).get("calibration")
        windows = "" if text is None else f" in {text['windows']} windows"
        if text is not None and text["first_token"] is not None:
            windows += f" that begin with token {text['first_token']}"
        lines.append(f"calibration: {tokens or 'no'} tokens{windows}, groups solved in {seconds:.1f} s")
    if record.ignored:
        lines += ["not quantized:", *_skipped(record.ignored, everything)]
    return "\n".join(textwrap.fill(line, width, subsequent_indent="    ", **WHOLE_WORDS) for line in lines)
