"""`WushConfig`: the settings of a run. The docstrings of `WushConfig` and `Recipe` are the manual."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .errors import ConfigError, WushError, one_of
from .formats import WEIGHT_FORMATS
from .recipe import RECIPE_FIELDS, Recipe

# The head stays in 16 bits unless `head`, an override or "!lm_head" in `ignore` says otherwise. In 4 bits its loss is
# large, and many heads share a weight with the embedding.
HEAD = "lm_head"
DEFAULT_IGNORE = (HEAD,)


# What patterns are matched with: the name of a module, or the names that a product of experts answers to, its weight's
# and its module's.
Names = str | tuple[str, ...]


def matches(name: Names, pattern: str) -> bool:
    """Whether a module's name, or the last component of the name, matches a glob pattern; of several names any."""
    names = (name,) if isinstance(name, str) else name
    return any(fnmatch.fnmatchcase(form, pattern) for one in names for form in (one, one.rpartition(".")[2]))


def ignored_by(name: Names, patterns: Iterable[str]) -> str | None:
    """The last pattern of `ignore` that matches a module's name; None without a match, or if it begins with `!`."""
    found = None
    for pattern in patterns:
        if matches(name, pattern.removeprefix("!")):
            found = None if pattern.startswith("!") else pattern
    return found


@dataclass(frozen=True)
class WushConfig(Recipe):
    """How a model is quantized: the default recipe of its linears, and other settings for some of them.

    The settings of `Recipe` hold for every linear that no override matches. An instance is immutable and saved in the
    checkpoint. Every setting has a default that works.

    head
        The format of the head's weight, `lm_head`: None (16 bits) or `int8`. The same as
        `overrides={"lm_head": {"format": "int8", "activation_format": None}}`, in front of all other overrides.
    ignore
        Modules that stay in 16 bits: glob patterns of names, or of the last component of a name (`"*.down_proj"`,
        `"router"`). The patterns add to the default, `("lm_head",)`. One that begins with `!` takes modules out again:
        `ignore=("!lm_head",)` quantizes the head. The last pattern that matches decides. Encoders of images or sound
        in front of a language model stay in 16 bits too, unless such a pattern matches them. An override that gives
        a format to the head by its name, without a wildcard, takes it out too.
    overrides
        Settings for some linears: `{"*.down_proj": {"format": "nvfp4"}}`. Patterns are those of `ignore`; later ones
        win. Linears with the same input share a transform only where their recipes are equal. In both settings the
        experts of a layer answer to the name of their module (`"*.experts"`) and to those of their weights
        (`"*.experts.down_proj"`).
    """

    head: str | None = None
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    overrides: Mapping[str, Mapping] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("head", self.head, (None, *WEIGHT_FORMATS))
        if isinstance(self.ignore, str):
            raise ConfigError(f"ignore is a sequence of names or patterns: write ignore=({self.ignore!r},)")
        given = tuple(self.ignore)
        object.__setattr__(self, "ignore", (*(p for p in DEFAULT_IGNORE if p not in given), *given))
        pairs = self.overrides.items() if isinstance(self.overrides, Mapping) else self.overrides
        try:
            overrides = {pattern: dict(settings) for pattern, settings in pairs}
        except (TypeError, ValueError):
            overrides = {None: {}}
        if not all(isinstance(pattern, str) for pattern in overrides):
            raise ConfigError(
                "overrides maps patterns of names to settings: give {'*.down_proj': {'format': 'nvfp4'}} in place of "
                f"{self.overrides!r}"
            )
        object.__setattr__(self, "overrides", overrides)
        for pattern, settings in overrides.items():
            for name in settings:
                one_of(f"setting in overrides[{pattern!r}]", name, RECIPE_FIELDS)
            self._changed(self.recipe, pattern, settings)

    @staticmethod
    def _changed(recipe: Recipe, pattern: str, settings: Mapping) -> Recipe:
        try:
            return dataclasses.replace(recipe, **settings)
        except (WushError, TypeError) as error:
            raise ConfigError(f"overrides[{pattern!r}]: {error}") from error

    @property
    def changes(self) -> list[tuple[str, Mapping]]:
        """(pattern, settings) of `head` and of the overrides, in the order in which they apply."""
        head = [] if self.head is None else [(HEAD, {"format": self.head, "activation_format": None})]
        return head + list(self.overrides.items())

    @property
    def recipe(self) -> Recipe:
        """The recipe of linears that no override matches."""
        return Recipe(**{name: getattr(self, name) for name in RECIPE_FIELDS})

    def recipe_of(self, name: Names) -> Recipe:
        """The recipe of the linear with this module name: the default, changed by each matching override in order."""
        recipe = self.recipe
        for pattern, settings in self.changes:
            if matches(name, pattern):
                recipe = self._changed(recipe, pattern, settings)
        return recipe.resolved()

    def ignores(self, name: Names) -> str | None:
        """The pattern of `ignore` that keeps a module in 16 bits, or None."""
        found = ignored_by(name, self.ignore)
        if found not in DEFAULT_IGNORE:
            return found
        named = (
            pattern for pattern, settings in self.changes if "format" in settings and not set(pattern) & set("*?[")
        )
        return None if any(matches(name, pattern) for pattern in named) else found

    @classmethod
    def paper(cls, format: str = "mxfp4", **changes) -> "WushConfig":
        """The authors' setting: GPTQ, conditional moments, their scale rules, rounding to nearest, equal tokens, a
        transform a linear, and weights that make up for no others."""
        settings = dict(
            moments="conditional",
            weight_scale_rule="paper",
            activation_scale_rule="paper",
            activation_rounding="nearest",
            sweeps=0,
            share_transform=False,
            correction=0.0,
            token_weights="uniform",
        )
        return cls.from_dict({"format": format, **settings, **changes})

    @classmethod
    def from_dict(cls, settings: dict) -> "WushConfig":
        """From settings by name, or a checkpoint's `config`. Wrong names are a `ConfigError` with the near match."""
        for name in settings:
            one_of("setting", name, CONFIG_FIELDS)
        return cls(**settings)

    def to_dict(self) -> dict:
        """Settings that JSON can hold; `from_dict` reads them. `overrides` is a list of pairs because order counts."""
        settings = {name: getattr(self, name) for name in CONFIG_FIELDS}
        overrides = [[pattern, dict(changes)] for pattern, changes in self.overrides.items()]
        return {**settings, "ignore": list(self.ignore), "overrides": overrides}


CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(WushConfig))
