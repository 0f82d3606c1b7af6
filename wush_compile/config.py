"""The one configuration object; its docstring is the manual."""

import dataclasses
from dataclasses import dataclass

from .errors import ConfigError, one_of
from .formats import get_format

TRANSFORMS = ("identity", "random", "hadamard", "wus", "wush")
SOLVERS = ("rtn", "gptq")
MOMENTS = ("marginal", "conditional")


@dataclass(frozen=True)
class WushConfig:
    """How a model is quantized. Immutable; saved in the checkpoint; every field has a default that just works.

    format
        `mxfp4` (groups of 32, power-of-two scales), `nvfp4` (groups of 16, e4m3 scales and one fp32 scale a tensor)
        or `int4` (groups of 32, bf16 scales; the integer format of the paper's Table 1).
    transform
        What is applied to both sides of every linear, blockwise (SPEC §2): `identity`, `random` (orthogonal),
        `hadamard`, `wus` (WUSH without its Hadamard) or `wush` (eq. 7).
    solver
        `rtn` rounds to nearest; `gptq` propagates every channel's error to the channels not yet quantized.
    moments
        `marginal`: every transform from its block's own second moment. `conditional`: the authors' schedule, from the
        moment given the channels not yet quantized (Algorithm 2).
    weight_scale_rule, activation_scale_rule
        How a group's scale follows from its values (SPEC §4): `absmax` clips nothing; `mse` takes the candidate of least
        squared error; `ocp` (mxfp4) is the Microscaling rule; `gaussian` (int4) is optimal for a normal distribution;
        `paper` is what the authors' code does.
    transform_block_size
        Channels a transform mixes: a power of two and a multiple of the format's group. None is the group. A linear whose
        width it does not divide gets the group size, and that is reported.
    share_transform
        Linears fed by the same tensor (q, k, v; gate, up) share one transform and one quantization of their input.
    ignore
        Modules left as they are: names, glob patterns, or last components of a name (`"lm_head"`, `"*.down_proj"`).
    damping
        Share of the mean diagonal added to second moments, and of the mean to singular values.
    seed
        Of everything random: `random` transforms, sampled calibration text, the rows kept for layer losses.
    """

    format: str = "mxfp4"
    transform: str = "wush"
    solver: str = "gptq"
    moments: str = "marginal"
    weight_scale_rule: str = "mse"
    activation_scale_rule: str = "mse"
    transform_block_size: int | None = None
    share_transform: bool = True
    ignore: tuple[str, ...] = ("lm_head",)
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        one_of("transform", self.transform, TRANSFORMS)
        one_of("solver", self.solver, SOLVERS)
        one_of("moments", self.moments, MOMENTS)
        for side in ("weight_scale_rule", "activation_scale_rule"):
            one_of(f"{side} for {self.format}", getattr(self, side), fmt.scale_rules)
        if isinstance(self.ignore, str):
            raise ConfigError(f"ignore is a sequence of names or patterns: write ignore=({self.ignore!r},)")
        object.__setattr__(self, "ignore", tuple(self.ignore))
        block = self.transform_block_size
        if block is not None and (not isinstance(block, int) or block < fmt.group_size or block & (block - 1)):
            raise ConfigError(
                f"transform_block_size {block!r} does not fit {self.format}: "
                f"it must be a power of two and a multiple of {fmt.group_size}, or None"
            )
        if not 0 <= self.damping < 1:
            raise ConfigError(f"damping is a share of the mean diagonal, at least 0 and below 1, not {self.damping!r}")

    @classmethod
    def paper(cls, format: str = "mxfp4", **changes) -> "WushConfig":
        """The authors' setting: GPTQ, conditional moments, their scale rules, a transform for each linear."""
        settings = dict(
            moments="conditional", weight_scale_rule="paper", activation_scale_rule="paper", share_transform=False
        )
        return cls.from_dict({"format": format, **settings, **changes})

    @classmethod
    def from_dict(cls, settings: dict) -> "WushConfig":
        """From keyword settings or a checkpoint's `config`; an unknown name is a `ConfigError` with the near match."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            one_of("setting", name, names)
        return cls(**settings)

    def to_dict(self) -> dict:
        """JSON-ready; `from_dict` takes it back."""
        return {**dataclasses.asdict(self), "ignore": list(self.ignore)}

    @property
    def group_size(self) -> int:
        """Channels a scale covers: 32 (mxfp4, int4) or 16 (nvfp4)."""
        return get_format(self.format).group_size

    @property
    def needs_data(self) -> bool:
        """Whether anything solved depends on activations: not for plain RTN with formats that have no global scale."""
        global_scale = self.format == "nvfp4" and self.activation_scale_rule != "paper"
        return self.solver == "gptq" or self.transform in ("wus", "wush") or global_scale
