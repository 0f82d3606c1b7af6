"""Fits the names in a record to a model: one with another head when loading, one that has changed when saving."""

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..config import WushConfig
from ..errors import CheckpointError
from ..experts import ExpertGroup
from ..modules import Member, WushGroup, WushLinear
from ..recipe import RECIPE_FIELDS
from .record import ATTRIBUTE, Quantization, quantization_of

# -- loading: the base model of a checkpoint, or its base with another head --------------------------------------------


@dataclass(frozen=True)
class Renaming:
    """From names on disk to names in a model: `strip` is taken from their front, `add` is put there. One is empty."""

    strip: str = ""
    add: str = ""

    def in_model(self, name: str) -> str | None:
        """The name in the model; None for what only the saved model has, such as its head."""
        return self.add + name.removeprefix(self.strip) if name.startswith(self.strip) else None

    def on_disk(self, name: str) -> str:
        """The name on disk of a name in the model."""
        return self.strip + name.removeprefix(self.add)


def _renaming(record: Quantization, model: nn.Module) -> Renaming:
    """As transformers does: `base_model_prefix` goes if the model is the base, comes if only the model has it."""
    base = getattr(model, "base_model_prefix", "")
    prefix, names = f"{base}.", [name for entry in record.groups for name in entry["members"]]
    if all(_exists(model, name) for name in names):  # heads alone may be quantized, which have no prefix
        return Renaming()
    saved = any(name.startswith(prefix) for name in names)
    if not base or saved == hasattr(model, base):
        return Renaming()
    return Renaming(strip=prefix) if saved else Renaming(add=prefix)


def _lacks(model: nn.Module, name: str) -> bool:
    """Whether a model lacks the whole part that a name is in. A list of layers that is too short is no such part."""
    for part in name.split("."):
        inner = getattr(model, part, None)
        if inner is None:
            return not part.isdigit()
        model = inner
    return False


def fitted(record: Quantization, model: nn.Module) -> tuple[Quantization, Renaming]:
    """The part of a record that a transformers model has, with the model's names, and how they were renamed.

    A part that the model does not have at all, such as a quantized head, a pooler or a decoder, is left out;
    transformers reports its tensors. If that is everything, the record comes back as it is.
    """
    names, groups, report = _renaming(record, model), [], {}
    for entry in record.groups:
        members = [names.in_model(name) for name in entry["members"]]
        if any(name is not None and not _lacks(model, name) for name in members):
            groups.append({**entry, "members": members})
            if entry["members"][0] in record.report:
                report[members[0]] = record.report[entry["members"][0]]
    if not groups or groups == record.groups:
        return record, Renaming()
    ignored = {names.in_model(name): reason for name, reason in record.ignored.items()}
    ignored.pop(None, None)
    return dataclasses.replace(record, groups=groups, ignored=ignored, report=report), names


# -- saving: a model that has changed since it was quantized ---------------------------------------------------------


def _members(model: nn.Module) -> dict[WushGroup, tuple[Member, ...]]:
    """The members of each group with the names that they have in the model now."""
    names: dict[WushGroup, dict[int, str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertGroup):
            names[module] = {0: name}
        elif isinstance(module, WushLinear):
            names.setdefault(module.owner, {})[module.start] = name
    return {group: _renamed(group, own) for group, own in names.items()}


def _renamed(group: WushGroup, names: dict[int, str]) -> tuple[Member, ...]:
    lost = [member.name for member in group.members if member.start not in names]
    if lost:
        kept = ", ".join(name or "the module itself" for name in names.values())
        raise CheckpointError(
            f"{', '.join(lost)} left the model, but {kept} shares a transform with it: put it "
            "back, or take out all linears with the same input"
        )
    return tuple(member._replace(name=names[member.start]) for member in group.members)


def _under(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _exists(model: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(parent), leaf)
    except AttributeError:
        return False


def up_to_date(model: nn.Module) -> Quantization:
    """The record of a quantized model as it is now; the same object if nothing has changed.

    Linears that are gone (a dropped layer) leave the record, and the others get the names that they have now. A model
    around a quantized submodule gets a record of the whole. The model does not change. Raises `CheckpointError` if a
    group has lost a part, and `WushError` if nothing in the model is quantized.
    """
    members = _members(model)
    if not members:
        return quantization_of(model)  # raises
    records = {path: vars(m)[ATTRIBUTE] for path, m in model.named_modules() if ATTRIBUTE in vars(m)}
    own, before = records.get(""), {group: group.members[0].name for group in members}
    if own is not None and len(records) == 1 and len(members) == len(own.groups):
        if all(group.members == now for group, now in members.items()):
            return own
    recipe = next(iter(members)).recipe
    config = next((r.config for r in records.values()), WushConfig(**{n: getattr(recipe, n) for n in RECIPE_FIELDS}))
    whole = Quantization(config, [], {}, example=own and own.example, run=own and own.run)
    roots = [(path, record, [entry["members"][0] for entry in record.groups]) for path, record in records.items()]
    described = []
    for group, now in members.items():
        names = [member.name for member in now]
        homes = [(path, i) for i, (path, _, _) in enumerate(roots) if f"{names[0]}.".startswith(_under(path, ""))]
        at = max(homes, default=("", len(roots)), key=lambda home: len(home[0]))[1]
        _, record, firsts = roots[at] if at < len(roots) else ("", whole, [])
        place = firsts.index(before[group]) if before[group] in firsts else len(firsts)
        experts = group.experts if isinstance(group, ExpertGroup) else None
        entry = whole.describe(names, group.block_size, group.recipe, experts)
        described.append((at, place, entry, record.report.get(before[group])))
    for _, _, entry, report in sorted(described, key=lambda one: one[:2]):
        whole.groups.append(entry)
        if report is not None:
            whole.report[entry["members"][0]] = report
    for path, record in records.items():
        inside = {_under(path, name): reason for name, reason in record.ignored.items()}
        whole.ignored |= {name: reason for name, reason in inside.items() if _exists(model, name)}
    for name, module in model.named_modules():
        outside = not any(f"{name}.".startswith(_under(path, "")) for path in records)
        if records and outside and isinstance(module, nn.Linear) and not isinstance(module, WushLinear):
            whole.ignored[name] = f"outside of {', '.join(records)}, which alone was quantized"
    return whole


def rename_members(model: nn.Module) -> None:
    """Gives the linears of all groups the names that they have in the model now."""
    for group, members in _members(model).items():
        group.members = members
