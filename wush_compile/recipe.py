"""`Recipe`: how one group of linears is quantized. The configuration resolves to one recipe for each linear."""

import dataclasses
from dataclasses import dataclass

from . import feedback
from .errors import ConfigError, one_of
from .formats import WEIGHT_FORMATS, get_format

TRANSFORMS = ("identity", "random", "hadamard", "wus", "wush")
SOLVERS = ("rtn", "gptq")
MOMENTS = ("marginal", "conditional")
ACTIVATION_FORMATS = ("same", "fp8", None)
ACTIVATION_ROUNDINGS = ("nearest", "feedback")
TOKEN_WEIGHTS = ("uniform", "gradient")


@dataclass(frozen=True)
class Recipe:
    """The settings of a group. Each is also a setting of `WushConfig`, and may be given to some linears in `overrides`.

    format
        `mxfp4` (groups of 32, power-of-two scales), `nvfp4` (groups of 16, e4m3 scales and one fp32 scale a tensor),
        `int4` (groups of 32, bf16 scales; the integer format of the paper's Table 1) or `int8` (groups of 32, bf16
        scales). `int8` is for weights alone: its activations are `fp8` or None. It is rounded to nearest and needs no
        transform, whatever the other settings say (docs/spec.md §4).
    transform
        What multiplies both sides of a linear, block by block (docs/spec.md §2): `identity`, `random` (orthogonal),
        `hadamard`, `wus` (WUSH without its Hadamard) or `wush` (eq. 7).
    solver
        `rtn` rounds to nearest. `gptq` passes the error of each channel to the channels not yet quantized.
    moments
        `marginal`: a transform follows from the second moment of its block alone. `conditional`: it follows from the
        moment given the channels not yet quantized, as in the authors' Algorithm 2. GPTQ goes over blocks in the order
        of their inputs' power with `marginal`, and in the model's with `conditional` (docs/spec.md §3).
    weight_scale_rule, activation_scale_rule
        How the scale of a group follows from its values (docs/spec.md §4). `absmax` clips nothing; `mse` takes the
        candidate of two with the least squared error, `search` (nvfp4) that of four; `ocp` (mxfp4) is the Microscaling
        rule; `gaussian` (int4) is optimal for a normal distribution; `paper` is the rule of the authors' code. Of
        weights alone: `loss` takes the one, of more candidates, with the least loss of GPTQ (with `rtn` it is `mse`);
        `best` is `loss` for nvfp4 and `mse` for the others, by measurement; with it each row of an mxfp4 weight has a
        factor besides, unless its transform follows from `conditional` moments.
    sweeps
        How often GPTQ goes over the weights again: each group is rounded anew, given all others (docs/spec.md §3).
    activation_format
        The format of activations. `same`: that of the weights, 4 bits. `fp8`: e4m3 with one fp32 scale a token; more
        than half of the loss of 4 bits on both sides goes away. None: 16 bits, only weights are quantized.
    activation_rounding
        How 4-bit activations are rounded. `feedback`: a group in four steps, each of which takes up what the errors of
        those before it cost (docs/spec.md §4); `nearest`: each value for itself. The transform `wush` in `mxfp4` and
        `nvfp4` alone has what feedback needs; with other transforms, formats, `activation_format`s and the scale rule
        `paper` the setting has no effect.
    transform_block_size
        Channels that a transform mixes: a power of two and a multiple of the format's group. None means the group. If
        the width of a linear is not a multiple of it, that linear uses the format's group, and a warning says so.
    share_transform
        Whether linears with the same input (q, k, v; gate, up) share one transform and one quantized input.
    damping
        The share of the mean diagonal that is added to second moments. The same share of the mean is added to singular
        values.
    correction
        How far the weights to be rounded make up for what the groups in front have done to their input, from 0 to 1, a
        share of the least-squares correction (GPTAQ, Qronos; docs/spec.md §3). The groups of a layer are then solved
        one after the other, and each layer of the unquantized model runs beside. 0 solves the groups of a layer
        together. Without `gptq`, and for experts and other rows that the data choose, the setting has no effect.
    token_weights
        What a token counts in second moments. `uniform`: all alike. `gradient`: by how much the model's log-likelihood
        depends on the linear's output for this token (docs/spec.md §3), which takes one more pass, forward and
        backward. The same pass says what an error of the input costs; transforms of 4-bit activations follow from it
        (§2). Where no gradient can be had, tokens count alike, and a warning says so.
    seed
        The seed of everything random: `random` transforms, sampled calibration text, the rows kept for layer losses.
    """

    format: str = "mxfp4"
    transform: str = "wush"
    solver: str = "gptq"
    moments: str = "marginal"
    weight_scale_rule: str = "best"
    activation_scale_rule: str = "mse"
    sweeps: int = 2
    activation_format: str | None = "same"
    activation_rounding: str = "feedback"
    transform_block_size: int | None = None
    share_transform: bool = True
    damping: float = 0.01
    correction: float = 0.25
    token_weights: str = "gradient"
    seed: int = 0

    def __post_init__(self) -> None:
        fmt = get_format(self.format)
        one_of("transform", self.transform, TRANSFORMS)
        one_of("solver", self.solver, SOLVERS)
        one_of("moments", self.moments, MOMENTS)
        one_of("activation_format", self.activation_format, ACTIVATION_FORMATS)
        one_of("activation_rounding", self.activation_rounding, ACTIVATION_ROUNDINGS)
        if self.format not in WEIGHT_FORMATS:  # which `resolved` gives their one rule
            for side in ("weight_scale_rule", "activation_scale_rule"):
                more = ("best", "loss") if side == "weight_scale_rule" else ()
                one_of(f"{side} for {self.format}", getattr(self, side), (*fmt.scale_rules, *more))
        elif self.activation_format == "same":
            raise ConfigError(
                f"{self.format} is a format of weights alone: give activation_format None (16 bits) or 'fp8' with it"
            )
        one_of("token_weights", self.token_weights, TOKEN_WEIGHTS)
        block = self.transform_block_size
        if block is not None and (not isinstance(block, int) or block < fmt.group_size or block & (block - 1)):
            raise ConfigError(
                f"transform_block_size {block!r} does not fit {self.format}: "
                f"it must be a power of two and a multiple of {fmt.group_size}, or None"
            )
        if not isinstance(self.sweeps, int) or self.sweeps < 0:
            raise ConfigError(f"sweeps is how often GPTQ goes over the weights again, 0 or more, not {self.sweeps!r}")
        if not 0 <= self.damping < 1:
            raise ConfigError(f"damping is a share of the mean diagonal, at least 0 and below 1, not {self.damping!r}")
        if not 0 <= self.correction <= 1:
            raise ConfigError(f"correction is a share of the whole correction, from 0 to 1, not {self.correction!r}")

    @property
    def group_size(self) -> int:
        """Channels that one scale covers: 32 (mxfp4, int4, int8) or 16 (nvfp4)."""
        return get_format(self.format).group_size

    def resolved(self) -> "Recipe":
        """What is done: weights of 8 bits are rounded to nearest by their one scale rule, without a transform.

        At 8 bits there is nothing to win: benchmarks/trial_weights.py measures what rounding alone costs.
        """
        if self.format not in WEIGHT_FORMATS:
            return self
        [rule] = get_format(self.format).scale_rules
        return dataclasses.replace(
            self,
            transform="identity",
            solver="rtn",
            moments="marginal",
            weight_scale_rule=rule,
            activation_scale_rule=rule,
            sweeps=0,
            transform_block_size=None,
            correction=0.0,
            token_weights="uniform",
        )

    @property
    def operand(self) -> str:
        """The format that the quantizer of activations writes: the weights' own, `fp8` or `none`."""
        return self.format if self.activation_format == "same" else self.activation_format or "none"

    @property
    def operand_rule(self) -> str:
        """The scale rule of that quantizer."""
        return {"fp8": "token", "none": "none"}.get(self.operand, self.activation_scale_rule)

    @property
    def rounds_with_feedback(self) -> bool:
        """Whether activations are rounded with feedback: only WUSH makes what an error costs diagonal after Had."""
        return (
            self.activation_rounding == "feedback"
            and self.transform == "wush"
            and self.activation_format == "same"
            and self.format in feedback.FORMATS
            and self.activation_scale_rule != "paper"
        )

    @property
    def factors_rows(self) -> bool:
        """Whether each row of a linear's weight has a factor, since scales that are powers of two are coarse.

        Not where transforms follow from conditional moments: W̃ is then known only when its block is reached.
        """
        on_the_way = self.moments == "conditional" and self.transform in ("wus", "wush")
        return self.format == "mxfp4" and self.weight_scale_rule == "best" and not on_the_way

    @property
    def corrects_weights(self) -> bool:
        """Whether the weights of a linear make up for the groups in front of it: GPTQ keeps the moment for that."""
        return self.correction > 0 and self.solver == "gptq"

    @property
    def effective(self) -> "Recipe":
        """The recipe without what has no effect: linears of equal effect share a group, whatever else they have."""
        return dataclasses.replace(
            self,
            activation_rounding=self.activation_rounding if self.rounds_with_feedback else "nearest",
            correction=self.correction if self.corrects_weights else 0.0,
        )

    @property
    def needs_data(self) -> bool:
        """Whether the solution depends on activations. RTN without calibrated transform and global scale needs none."""
        if self.format in WEIGHT_FORMATS:
            return False
        global_scale = self.operand == "nvfp4" and self.activation_scale_rule != "paper"
        return self.solver == "gptq" or self.transform in ("wus", "wush") or global_scale

    def changes_from(self, base: "Recipe") -> dict:
        """The settings in which this recipe differs from `base`, by name."""
        return {name: getattr(self, name) for name in RECIPE_FIELDS if getattr(self, name) != getattr(base, name)}


RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
