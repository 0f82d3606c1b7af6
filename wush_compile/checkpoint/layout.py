"""The layout of a checkpoint (docs/spec.md §7): each linear has its tensors on disk, each group its buffers in memory.

A checkpoint is a directory of safetensors files and a `config.json`. That file holds the `quantization_config` and a
digest of the `quantization_config` and of every tensor. Nothing is unpickled. A model changes only after everything has
been checked.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..experts import ExpertGroup, WushExperts, is_experts, products_of
from ..modules import Member, WushGroup, WushLinear, buffer_layout, named_groups
from .files import Spec
from .record import Quantization

OTHER_MODEL = "load it into the kind of model it was made from"
OTHER_TENSORS = f"{OTHER_MODEL}; if it is, config.json and the tensors do not belong together: quantize the model again"
# Each member stores its rows of these, and of weight_global_scale too if each row has its own; else a copy of that. A
# product of experts is stored whole.
BY_ROWS = ("weight_packed", "weight_scale", "bias")


# -- groups <-> linears ----------------------------------------------------------------------------------------------


def parts(group: WushGroup) -> Iterator[tuple[str, list[tuple[str, slice | None]]]]:
    """For each buffer of a group: its name, and its tensors on disk as (name, rows of the buffer; None for all)."""
    first = group.members[0].name
    for buffer, _ in group.named_buffers():
        if buffer.startswith("input_") or isinstance(group, ExpertGroup):
            yield buffer, [(f"{first}.{buffer}", None)]
            continue
        members = [m for m in group.members if m.has_bias or buffer != "bias"]
        by_rows = buffer in BY_ROWS or (buffer == "weight_global_scale" and group.recipe.factors_rows)
        yield buffer, [(f"{m.name}.{buffer}", slice(m.start, m.stop) if by_rows else None) for m in members]


def join_rows(group: WushGroup, buffer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """A group's buffer, joined from its tensors on disk. A member without a bias gets zeros."""
    pieces = dict(parts(group))[buffer]
    if pieces[0][1] is None:
        return tensors[pieces[0][0]].clone()
    if buffer != "bias":
        return torch.cat([tensors[name] for name, _ in pieces])
    bias = tensors[pieces[0][0]].new_zeros(group.weight_packed.shape[0])
    for name, rows in pieces:
        bias[rows] = tensors[name]
    return bias


def split_group(group: WushGroup, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A group's buffers as the tensors of its linears, by their names on disk. `state` gives other buffers, by name.

    Rows are views of the buffers, each with a storage of its own.
    """
    state, split = dict(group.named_buffers()) if state is None else state, {}
    for buffer, pieces in parts(group):
        tensor = state[buffer]
        for i, (name, rows) in enumerate(pieces):
            if rows is not None:
                # DLPack gives a view its own storage. Writers would take views of one storage for tied weights.
                split[name] = torch.from_dlpack(tensor[rows])
            else:
                split[name] = tensor if i == 0 else tensor.clone()
    return split


def split_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """`model.state_dict()`, or `state`, with every group's buffers split into the tensors of its linears."""
    state = dict(model.state_dict() if state is None else state)
    for path, group in named_groups(model):
        state |= split_group(group, {buffer: state.pop(f"{path}.{buffer}") for buffer, _ in parts(group)})
    return state


def replaces(groups: Iterable[WushGroup]) -> Callable[[str], bool]:
    """A function that tells, by its name in the unquantized model, whether groups replace a tensor."""
    modules, weights = [], set()
    for group in groups:
        if isinstance(group, ExpertGroup):
            weights |= {group.members[0].name, f"{group.members[0].name}_bias"}
        else:
            modules += [f"{name}." for member in group.members for name in (member.name, *member.embeddings)]
    prefixes = tuple(modules)
    return lambda name: name in weights or name.startswith(prefixes)


def expert_weight(model: nn.Module, name: str) -> tuple[nn.Module, Tensor] | None:
    """(the module of experts, its parameter) if a name is that of a product of experts."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if not is_experts(module) or isinstance(module, WushExperts) or leaf not in products_of(module):
        return None
    return module, getattr(module, leaf)


def replaced_weight(model: nn.Module, group: WushGroup) -> Tensor:
    """The weight of a group's first member in the unquantized model."""
    name = group.members[0].name
    return model.get_parameter(name) if isinstance(group, ExpertGroup) else model.get_submodule(name).weight


def _product(model: nn.Module, record: Quantization, entry: Mapping, specs: Mapping[str, Spec], device) -> ExpertGroup:
    """The empty group of a product of experts."""
    [name], block, recipe = entry["members"], entry["transform_block_size"], record.recipe_of(entry)
    module, weight = expert_weight(model, name)
    experts, rows, width = (weight.mT if module.is_transposed else weight).shape
    if entry["experts"] != experts:
        raise CheckpointError(
            f"{name} has {experts} experts in this {type(model).__name__}, {entry['experts']} in the checkpoint: "
            f"{OTHER_MODEL}"
        )
    if block % recipe.group_size or width % block:
        raise CheckpointError(f"{name}: width {width} does not fit transform blocks of {block}: {OTHER_MODEL}")
    found = specs.get(f"{name}.input_transform")
    layout = buffer_layout(recipe, rows, width, block, found.dtype if found else weight.dtype, module.has_bias, experts)
    if module.has_bias:
        bias = specs.get(f"{name}.bias")
        layout["bias"] = layout["bias"][0], bias.dtype if bias else weight.dtype
    buffers = {k: None if v is None else torch.empty(v[0], dtype=v[1], device=device) for k, v in layout.items()}
    return ExpertGroup([Member(name, 0, rows, bool(module.has_bias))], recipe, block, buffers)


def _linear(model: nn.Module, name: str) -> tuple[int, int, nn.Module]:
    """(out_features, in_features, module) of a linear that is to be replaced."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"the checkpoint quantizes {name!r}, which this {type(model).__name__} does not have: {OTHER_MODEL}"
        ) from None
    if isinstance(module, WushLinear):
        raise CheckpointError(f"{name!r} is already quantized in this {type(model).__name__}: load into a fresh model")
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features, module
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's; its weight is [K, N]
        return module.nf, module.weight.shape[0], module
    raise CheckpointError(
        f"the checkpoint quantizes {name!r}, which is a {type(module).__name__} in this "
        f"{type(model).__name__}, not a linear: {OTHER_MODEL}"
    )


def _embeddings(model: nn.Module, names: list[str], rows: int, width: int) -> tuple[str, ...]:
    """The names of embeddings that look up the rows of a quantized head of [rows, width]."""
    for name in names:
        module = dict(model.named_modules()).get(name)
        if not isinstance(module, nn.Embedding) or tuple(module.weight.shape) != (rows, width):
            raise CheckpointError(
                f"{name!r} looks up the head's {rows} rows of {width} in the checkpoint, in this "
                f"{type(model).__name__} it does not: {OTHER_MODEL}"
            )
    return tuple(names)


def build_groups(
    model: nn.Module, record: Quantization, specs: Mapping[str, Spec] | None = None, device: torch.device | str = "meta"
) -> list[WushGroup]:
    """Empty groups for the linears (nn.Linear, Conv1D) and experts of an unquantized model. The model stays as it is.

    `modules.buffer_layout` gives the shapes of the buffers. Transforms and biases have the dtypes in `specs` (of the
    tensors on disk, by name), else that of the weight. Raises `CheckpointError` if a name, a type or a width does not
    fit.
    """
    groups, seen = [], set()
    for entry in record.groups:
        names, block, recipe = entry["members"], entry["transform_block_size"], record.recipe_of(entry)
        if "experts" in entry and len(names) == 1 and expert_weight(model, names[0]) and names[0] not in seen:
            groups.append(_product(model, record, entry, specs or {}, device))
            seen.add(names[0])
            continue
        linears = [_linear(model, name) for name in names]
        if not names or len(set(names)) < len(names) or seen.intersection(names):
            raise CheckpointError(
                f"a linear is in two groups, or a group is empty (at {', '.join(names)}): "
                "config.json was edited; quantize the model again"
            )
        seen.update(names)
        widths = {width for _, width, _ in linears}
        width = widths.pop()
        if widths or block % recipe.group_size or width % block:
            widths = sorted({w for _, w, _ in linears})
            raise CheckpointError(
                f"{', '.join(names)}: widths {widths} do not fit one group "
                f"with transform blocks of {block}: {OTHER_MODEL}"
            )
        members, start = [], 0
        for name, (rows, _, module) in zip(names, linears, strict=True):
            embeddings = _embeddings(model, entry.get("embeddings", []), rows, width) if not members else ()
            members.append(Member(name, start, start + rows, module.bias is not None, embeddings))
            start += rows
        biased = [m.name for m in members if m.has_bias]
        dtypes = {name: spec.dtype for name, spec in (specs or {}).items() if spec.dtype.is_floating_point}
        weight_dtype = linears[0][2].weight.dtype
        layout = buffer_layout(
            recipe, start, width, block, dtypes.get(f"{names[0]}.input_transform", weight_dtype), bool(biased)
        )
        if biased:
            layout["bias"] = (layout["bias"][0], dtypes.get(f"{biased[0]}.bias", weight_dtype))
        buffers = {k: None if v is None else torch.empty(v[0], dtype=v[1], device=device) for k, v in layout.items()}
        groups.append(WushGroup(members, recipe, block, buffers))
    return groups


def group_specs(groups: Iterable[WushGroup]) -> dict[str, Spec]:
    """The specs of the tensors on disk that groups need, by name."""
    return {
        name: Spec(tuple(buffer[rows].shape if rows is not None else buffer.shape), buffer.dtype)
        for group in groups
        for kind, pieces in parts(group)
        for name, rows in pieces
        for buffer in [getattr(group, kind)]
    }


def read_record(settings: Mapping) -> Quantization:
    """`Quantization.from_dict`, which raises `CheckpointError` for anything malformed."""
    try:
        record = Quantization.from_dict(dict(settings))
        well_formed = isinstance(record.ignored, dict) and all(
            isinstance(g["members"], list)
            and all(isinstance(name, str) for name in g["members"])
            and isinstance(g["transform_block_size"], int)
            and g["transform_block_size"] > 0
            and isinstance(g.get("experts", 1), int)
            and isinstance(g.get("embeddings", []), list)
            and isinstance(g["recipe"], dict)
            for g in record.groups
        )
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError):
        well_formed = False
    if not well_formed:
        raise CheckpointError("quantization_config is malformed: config.json was edited; quantize the model again")
    return record


def check_specs(
    found: Mapping[str, Spec],
    groups: list[WushGroup],
    rest: Mapping[str, tuple[int, ...]],
    optional: Iterable[str] = (),
) -> None:
    """Checks the tensors of a checkpoint against its groups, and against `rest`, the shapes of all other tensors.

    Names in `optional` may be missing. Raises `CheckpointError` for a missing tensor, a wrong shape or dtype, and a
    tensor that nothing in the model needs.
    """
    expected = group_specs(groups)
    for name, spec in expected.items():
        if name not in found:
            raise CheckpointError(f"the checkpoint lacks {name}: copy or save it again")
        if found[name] != spec:
            raise CheckpointError(
                f"{name} is {found[name].dtype} {list(found[name].shape)}, the model needs "
                f"{spec.dtype} {list(spec.shape)}: {OTHER_TENSORS}"
            )
    for name, shape in rest.items():
        if name in found and found[name].shape != tuple(shape):
            raise CheckpointError(
                f"{name} has shape {list(found[name].shape)}, the model needs {list(shape)}: {OTHER_MODEL}"
            )
    if missing := sorted(set(rest) - set(found) - set(optional)):
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}: {OTHER_MODEL}")
    if unknown := sorted(set(found) - set(expected) - set(rest)):
        raise CheckpointError(f"the model has no {_some(unknown)}: {OTHER_TENSORS}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
