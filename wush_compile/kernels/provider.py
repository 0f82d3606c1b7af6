"""What a provider is: a set of kernels, and which calls they accept."""

from collections.abc import Callable
from typing import NamedTuple

from ..ops import fused, schema  # noqa: F401  (fused: every op is defined)


class Implementation(NamedTuple):
    """An op of a provider; `refuses(*args)` is a sentence, or None if it takes the call. Where `yields(*args)`, others are
    known to be faster: it is asked after them."""

    run: Callable
    refuses: Callable[..., str | None]
    yields: Callable[..., bool] = lambda *args: False


class Mendable(str):
    """Why a provider is unavailable, where that is a fault of the installation and not of the device: a warning."""


class Provider(NamedTuple):
    """Kernels of one kind; `unavailable(capability)` is a sentence, or None if they run on such a device."""

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
