"""The record of how a model was quantized: kept on the model, saved in its checkpoint (SPEC §7)."""

from dataclasses import dataclass, field

from torch import nn

from ..config import WushConfig
from ..errors import CheckpointError, WushError

FORMAT_VERSION = 1
ATTRIBUTE = "wush_quantization"


@dataclass
class Quantization:
    """What was quantized, how, and what was left alone.

    groups   one dict a group: `members` (module names, in row order) and `transform_block_size`
    ignored  module or parameter name -> why it was not quantized
    report   path of a group's first member -> measurements of the run that made it; not saved
    """

    config: WushConfig
    groups: list[dict]
    ignored: dict[str, str]
    report: dict[str, dict] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The `quantization_config` of a checkpoint."""
        return {
            "quant_method": "wush",
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "groups": self.groups,
            "ignored": self.ignored,
        }

    @classmethod
    def from_dict(cls, data: dict) -> "Quantization":
        """Reads what `to_dict` wrote; a newer version, an unknown key or a missing one is a `CheckpointError`."""
        version = data.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format_version {version!r}, this wush_compile reads up to {FORMAT_VERSION}: "
                "upgrade wush-compile"
            )
        expected = {"quant_method", "format_version", "config", "groups", "ignored"}
        if unknown := sorted(set(data) - expected):
            raise CheckpointError(
                f"quantization_config has unknown keys {', '.join(unknown)}: the file is not "
                "wush_compile's, or was edited; quantize the model again"
            )
        if missing := sorted(expected - set(data)):
            raise CheckpointError(f"quantization_config lacks {', '.join(missing)}: quantize the model again")
        for group in data["groups"]:
            if set(group) != {"members", "transform_block_size"}:
                raise CheckpointError(
                    f"a group of quantization_config has the keys {sorted(group)}, not members and "
                    "transform_block_size: quantize the model again"
                )
        try:
            config = WushConfig.from_dict(data["config"])
        except (WushError, TypeError) as error:
            raise CheckpointError(f"quantization_config.config cannot be read: {error}") from error
        return cls(config, data["groups"], data["ignored"])


def quantization_of(model: nn.Module) -> Quantization:
    """The record of a quantized model; a `WushError` for any other."""
    record = getattr(model, ATTRIBUTE, None)
    if record is None:
        raise WushError(f"this {type(model).__name__} is not quantized: call wush_compile.quantize(model) first")
    return record
