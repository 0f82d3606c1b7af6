"""The record of how a model was quantized. The model keeps it, and its checkpoint saves it (docs/spec.md §7)."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..config import WushConfig
from ..errors import CheckpointError, WushError
from ..recipe import Recipe

log = logging.getLogger("wush_compile")
FORMAT_VERSION = 5
ATTRIBUTE = "wush_quantization"
REPORT = "wush_report.json"


@dataclass
class Quantization:
    """What was quantized, how, and what was not.

    config   the settings of the run
    groups   a dict for each group: `members` (module names in row order), `transform_block_size`, and `recipe` (the
             settings in which the group differs from `config`); of a product of experts the name of its weight, and
             `experts`, their number; of a tied head `embeddings`, the modules that look up its rows
    ignored  name of a module or parameter -> why it was not quantized
    report   name of a group's first member -> what the run measured (tokens, losses, seconds); `wush_report.json`
    example  names, dtypes and shapes of the inputs that the model was traced on (`capture.example`); in the same file
    run      `seconds` by phase, `device` and `peak_memory` in bytes of the call that finished the run, and `verified`:
             what `calibration.verify` returned; same file
    """

    config: WushConfig
    groups: list[dict]
    ignored: dict[str, str]
    report: dict[str, dict] = field(default_factory=dict)
    example: dict | None = None
    run: dict | None = None

    def describe(
        self,
        members: list[str],
        transform_block_size: int,
        recipe: Recipe,
        experts: int | None = None,
        embeddings: Sequence[str] = (),
    ) -> dict:
        """The entry of a group in `groups`."""
        changes = recipe.changes_from(self.config)
        entry = {"members": members, "transform_block_size": transform_block_size, "recipe": changes}
        entry |= {} if experts is None else {"experts": experts}
        return entry | ({"embeddings": list(embeddings)} if embeddings else {})

    def recipe_of(self, entry: dict) -> Recipe:
        """The recipe of an entry of `groups`."""
        return dataclasses.replace(self.config.recipe, **entry["recipe"])

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
        """Reads what `to_dict` wrote, in this version or an earlier one.

        Up to version 4 no weights are corrected, up to version 3 rows have no factors, up to version 2 activations are
        rounded to nearest. In version 1 all groups have the recipe of `config`.
        Raises `CheckpointError` for a newer version, for unknown or missing keys, and for the layout of the authors.
        """
        if "format_version" not in data and "groups" not in data:
            raise CheckpointError(
                "the checkpoint is in the layout of the WUSH authors' code (github.com/IST-DASLab/WUSH), which has the "
                "same quant_method: load it with that code, or quantize the original model with wush_compile"
            )
        version = data.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format_version {version!r}, this wush_compile reads versions up to "
                f"{FORMAT_VERSION}: upgrade wush-compile"
            )
        expected = {"quant_method", "format_version", "config", "groups", "ignored"}
        if unknown := sorted(set(data) - expected):
            raise CheckpointError(
                f"quantization_config has unknown keys {', '.join(unknown)}: wush_compile did not write it, or it was "
                "edited; quantize the model again"
            )
        if missing := sorted(expected - set(data)):
            raise CheckpointError(f"quantization_config lacks {', '.join(missing)}: quantize the model again")
        keys = {"members", "transform_block_size"} | ({"recipe"} if version > 1 else set())
        for group in data["groups"]:
            if set(group) - {"experts", "embeddings"} != keys:
                raise CheckpointError(
                    f"a group of quantization_config has the keys {sorted(group)}, not {sorted(keys)}: "
                    "quantize the model again"
                )
        config, groups = data["config"], data["groups"]
        if version < 3:
            config = {**config, "activation_rounding": "nearest"}
        if version == 1:
            groups = [{**group, "recipe": {}} for group in groups]
            if "lm_head" not in config.get("ignore", ()):  # in version 1 `ignore` replaced its default
                config = {**config, "ignore": [*config.get("ignore", ()), "!lm_head"]}
        if version < 5:
            config = {**config, "correction": 0.0}
        if version < 4:
            config, groups = _without_factors(config, groups)
        try:
            record = cls(WushConfig.from_dict(config), groups, data["ignored"])
            for group in groups:
                record.recipe_of(group)
        except (WushError, TypeError) as error:
            raise CheckpointError(f"quantization_config.config cannot be read: {error}") from error
        return record


def _without_factors(config: dict, groups: list[dict]) -> tuple[dict, list[dict]]:
    """With the rule of weights' scales that `best` stood for up to version 3, by the format."""
    if config.get("weight_scale_rule", "best") != "best":
        return config, groups
    rule = {"nvfp4": "loss"}
    groups = [
        {**group, "recipe": {"weight_scale_rule": rule.get(format, "mse"), **group["recipe"]}}
        if (format := group["recipe"].get("format"))
        else group
        for group in groups
    ]
    return {**config, "weight_scale_rule": rule.get(config.get("format"), "mse")}, groups


def quantization_of(model: nn.Module) -> Quantization:
    """The record of a quantized model. Raises `WushError` for any other model."""
    record = getattr(model, ATTRIBUTE, None)
    if record is None:
        inner = next((path for path, module in model.named_modules() if ATTRIBUTE in vars(module)), None)
        if inner is not None:
            raise WushError(
                f"only {inner} of this {type(model).__name__} is quantized: give that module, or save the model, which "
                "gives it a record of the whole"
            )
        raise WushError(f"this {type(model).__name__} is not quantized: call wush_compile.quantize(model) first")
    return record


def write_report(record: Quantization, directory: Path) -> None:
    """Writes `wush_report.json`: what the run measured and took, and the example inputs. No file without reports."""
    if record.report:
        contents = {"report_version": 1, "groups": record.report, "example": record.example, "run": record.run}
        text = json.dumps(contents, indent=1, sort_keys=True)
        (directory / REPORT).write_text(text + "\n", encoding="utf-8")


def read_report(record: Quantization, directory: Path) -> None:
    """Reads the reports of a checkpoint into its record: none if there is no file, or, with a warning, a damaged one.

    No weight depends on them.
    """
    path = directory / REPORT
    record.report, record.example, record.run = {}, None, None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        groups, example = contents["groups"], contents.get("example")
        if not isinstance(groups, dict) or not all(isinstance(report, dict) for report in groups.values()):
            raise ValueError("its groups are not reports")
        if example is not None and not isinstance(example, dict):
            raise ValueError("its example is not a description of inputs")
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): explain shows no losses", path, error)
        return
    record.report, record.example = groups, example
    record.run = contents.get("run") if isinstance(contents.get("run"), dict) else None
