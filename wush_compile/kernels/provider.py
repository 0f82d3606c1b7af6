"""What a provider is: kernels, and the calls that they accept."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..ops import fused, schema  # noqa: F401  (fused: every op is defined)

# The dtypes of models that kernels compute in.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def has_row_factors(weight_global_scale: torch.Tensor | None) -> bool:
    """Whether `wush::fp4_linear` divides each column of the result by a number of its own (docs/spec.md §6)."""
    return weight_global_scale is not None and weight_global_scale.dtype == torch.bfloat16


class Implementation(NamedTuple):
    """One op of a provider. All three functions take the arguments of the op.

    run            computes the op
    refuses        why this provider does not take the call, in a sentence; None if it does
    prefer_others  True where other providers are known to be faster; then this one is asked last
    """

    run: Callable
    refuses: Callable[..., str | None]
    prefer_others: Callable[..., bool] = lambda *args: False


class FixableReason(str):
    """Why a provider is unavailable, if the user can fix the installation. `dispatch` logs it as a warning."""


class Provider(NamedTuple):
    """A set of kernels.

    unavailable    why they do not run on a device of this compute capability, in a sentence; None if they do
    load           imports them: op -> implementation
    """

    name: str
    unavailable: Callable[[tuple[int, int]], str | None]
    load: Callable[[], dict[str, Implementation]]


def implementations(provider: Provider) -> dict[str, Implementation]:
    """Op -> implementation of a provider, loaded and checked: `SignatureError` where a function does not fit its op."""
    table = provider.load()
    for op, implementation in table.items():
        for role, function in implementation._asdict().items():
            schema.check(op, f"{provider.name}'s `{role}`", function)
    return table
