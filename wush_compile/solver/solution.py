"""What the solver returns for a group, and the shapes and costs that follow from a recipe."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..recipe import Recipe
from .choose import CLOSED_FORM, uses_conditional_moments

# Rises when the same weights, data and settings get other codes: no run goes on with the stages of another revision.
REVISION = 5


@dataclass
class GroupSolution:
    """All that a group of linears with one input needs to run in 4 bits. N counts the stacked rows of all members."""

    transform: Tensor | None  # [K/B, B, B], or [1, B, B] if all blocks share one; model dtype
    transform_block_size: int  # B
    weight_packed: Tensor  # uint8 [N, K/2]
    weight_scale: Tensor  # uint8 [N, K/G]; int4: bf16
    weight_global_scale: Tensor | None  # fp32 [1], or bf16 [N], a factor of each row; None for 1
    input_global_scale: Tensor | None  # fp32 [1]; None for 1
    report: dict  # plain numbers
    input_feedback: Tensor | None = None  # bf16 [K/G, 6, G/4]; None: activations are rounded to nearest


def block_size(recipe: Recipe, width: int) -> int:
    """Transform block size B for `width` input channels: the configured one if it divides the width, else the group."""
    group = recipe.group_size
    if width % group:
        raise ConfigError(
            f"width {width} is not a multiple of {recipe.format}'s group of {group}: put the layer in ignore"
        )
    block = recipe.transform_block_size or group
    return block if width % block == 0 else group


def moment_shape(recipe: Recipe, width: int) -> tuple[int, ...]:
    """Shape of the second moment to accumulate: [K, K] if solving needs pairs across blocks, else [K/B, B, B]."""
    if recipe.solver == "gptq" or uses_conditional_moments(recipe):
        return (width, width)
    block = block_size(recipe, width)
    return (width // block, block, block)


def weight_rule(recipe: Recipe) -> str:
    """The scale rule of the weights. Rounding to nearest passes no errors on, so it has no `loss` beside `mse`.

    On SmolLM2 (benchmarks/trial_token_weights.py) `loss` has 6 to 13 % less KL than `mse` with NVFP4 weights; with
    MXFP4, whose scales are powers of two, the two differ by chance.
    """
    rule = recipe.weight_scale_rule
    if rule == "best":
        rule = "loss" if recipe.format == "nvfp4" else "mse"
    return "mse" if rule == "loss" and recipe.solver == "rtn" else rule


def uses_moment(recipe: Recipe) -> bool:
    """Whether the solution depends on the second moment: the transform's closed form and GPTQ do."""
    return recipe.solver == "gptq" or recipe.transform in CLOSED_FORM


def solve_cost(recipe: Recipe, rows: int, width: int) -> float:
    """Estimated operations to solve a group, for comparing groups."""
    if len(moment_shape(recipe, width)) == 2:
        return width**3 / 3 + rows * width**2  # the Cholesky factor, and errors passed from channel to channel
    return rows * width * block_size(recipe, width)
