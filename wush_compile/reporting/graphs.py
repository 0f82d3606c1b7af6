"""The graphs of a quantized model: a layer as captured, before and after, and as the compile backend rewrites it.

Graphs are derived anew from the model on every call: a stored copy would lie after a change.
"""

import itertools

import torch
from torch import nn

from ..backend import preview
from ..capture.example import build_batch
from ..capture.export import capture, constant_inputs, evaluating
from ..capture.meta import meta_copy
from ..checkpoint.record import quantization_of
from ..data import Batch
from ..errors import CaptureError, ConfigError, one_of
from ..experts import WushExperts
from ..graphs.log import GraphTrace
from ..graphs.printing import print_graph
from ..modules import WushGroup, WushLinear
from ..passes.calibration.partition import Stage, partition
from .summary import model_dtype


def example_inputs(model: nn.Module, device: torch.device | str) -> Batch:
    """Inputs to trace a quantized model with: like those that it was calibrated on, or a guess where none are known.

    The guess is token ids or images for Hugging Face models, by their `main_input_name`, and rows of the first linear's
    width for other modules. Raises `CaptureError` for Hugging Face models with other inputs.
    """
    example = quantization_of(model).example
    if example is not None:
        return build_batch(example, device)
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if name is None:
        first = next(m for m in model.modules() if isinstance(m, WushLinear))
        return (torch.zeros((2, first.in_features), dtype=model_dtype(model), device=device),)
    if name == "input_ids":
        return {name: torch.zeros((2, 8), dtype=torch.int64, device=device)}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, int):
        shape = (2, getattr(config, "num_channels", 3), size, size)
        return {name: torch.zeros(shape, dtype=model_dtype(model), device=device)}
    raise CaptureError(
        f"the checkpoint does not say what inputs {type(model).__name__} takes: quantize the model again for its graphs"
    )


def first_layers(model: nn.Module) -> nn.Module:
    """A copy without values that keeps only the first element of each list of layers: quick to trace.

    It is on the model's device, and on the CPU for a model on the meta device. No memory is written.
    """
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    model, cut = meta_copy(model), []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in cut)
        if isinstance(module, nn.ModuleList) and not inside and any(isinstance(m, WushGroup) for m in module.modules()):
            cut.append(name)
    for name in cut:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(name)[:1])
    return model.to_empty(device="cpu" if device.type == "meta" else device)


def _before(model: nn.Module) -> nn.Module:
    """The model with plain linears and experts where the quantized ones were."""
    for name, module in list(model.named_modules()):
        if isinstance(module, WushExperts):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.unquantized(model_dtype(model)))
        if isinstance(module, WushLinear):
            parent, _, leaf = name.rpartition(".")
            plain = nn.Linear(
                module.in_features, module.out_features, bias=module.has_bias, device="meta", dtype=model_dtype(model)
            )
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def _first_layer(model: nn.Module) -> Stage:
    """The stage of the first repeated layer; the only stage where there is none."""
    stages = partition(capture(model, [example_inputs(model, "meta")]).graph_module)
    return next((s for s in stages if s.name not in ("inputs", "outputs")), stages[0])


def captured_stages(model: nn.Module) -> dict[str, Stage]:
    """The first layer `before` and `after` quantization, traced on the meta device."""
    return {"before": _first_layer(_before(meta_copy(model))), "after": _first_layer(meta_copy(model))}


def captured_graphs(model: nn.Module) -> str:
    """The first layer's graph before and after quantization, as text."""
    return "\n\n".join(
        f"{when}: {stage.name}({', '.join(stage.inputs)})\n{print_graph(stage.graph_module.graph)}"
        for when, stage in captured_stages(model).items()
    )


def compiled_trace(model: nn.Module) -> GraphTrace:
    """The graph inside the compile backend, in eval mode, after each pass. The model does not run.

    Raises `CaptureError` for a model that torch.compile does not trace as one graph.
    """
    example = example_inputs(model, next(model.parameters(), next(model.buffers())).device)
    named = {**example, **constant_inputs(model)} if isinstance(example, dict) else {}
    with evaluating(model):
        return preview(model, *(() if named else example), **named)


def compiled_graph(model: nn.Module, layer: int = 0, after: str | None = None) -> str:
    """A layer's graph inside the compile backend, in eval mode: after the pass `after`, or before and after all passes.

    The model does not run. Raises `ConfigError` for an unknown pass, or a layer that the model does not have, and
    `CaptureError` for a model that torch.compile does not trace as one graph.
    """
    trace = compiled_trace(model)
    if after is not None:
        one_of("pass", after, [snapshot.step for snapshot in trace.snapshots])
    if layer and not trace["incoming"].text(layer):
        raise ConfigError(f"{type(model).__name__} has no layer {layer}")
    return trace.text(after, layer)
