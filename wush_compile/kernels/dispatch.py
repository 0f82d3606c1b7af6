"""Chooses who computes an op, from one table of providers that is resolved once a process and device.

For each op, a provider has a function, and a predicate that says from the arguments alone why it does not take a call.
`dispatch` asks the providers in order; the reference computes what none takes. A provider that fails at run time is
dropped for that op, with one warning.
`WUSH_PROVIDER=reference` (or `scaled_mm`, `cuda`, `triton`, `cpu`) leaves only that provider in front of the reference,
and raises its errors. A device is the index of a GPU, or None for the CPU.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch

from ..errors import one_of
from . import cpu
from .provider import FixableReason, Implementation, Provider, implementations

logger = logging.getLogger("wush_compile")


def _triton_unavailable(capability: tuple[int, int]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def _load_triton() -> dict[str, Implementation]:
    from .triton import provider as triton_provider

    return triton_provider.IMPLEMENTATIONS


def _cuda_unavailable(capability: tuple[int, int]) -> str | None:
    from . import cuda

    return cuda.unavailable(capability)


def _load_cuda() -> dict[str, Implementation]:
    from . import cuda

    return cuda.IMPLEMENTATIONS


def _scaled_mm_unavailable(capability: tuple[int, int]) -> str | None:
    from . import scaled_mm

    return scaled_mm.unavailable(capability)


def _load_scaled_mm() -> dict[str, Implementation]:
    from . import scaled_mm

    return scaled_mm.IMPLEMENTATIONS


# Of GPUs, in the order in which they are asked.
PROVIDERS = (
    Provider("scaled_mm", _scaled_mm_unavailable, _load_scaled_mm),
    Provider("cuda", _cuda_unavailable, _load_cuda),
    Provider("triton", _triton_unavailable, _load_triton),
)
# Ops that write into their arguments: they cannot be computed a second time after a failure.
IN_PLACE = ("observe",)
CPU_PROVIDERS = (Provider("cpu", lambda capability: cpu.unavailable(), lambda: cpu.IMPLEMENTATIONS),)
NAMES = (*(p.name for p in (*PROVIDERS, *CPU_PROVIDERS)), "reference")


def arithmetic(format: str, capability: tuple[int, int] | None, activation: str = "same") -> str:
    """How a device multiplies weights of a format with activations of that format, or of `fp8` or `none`, in words."""
    if capability is None:
        fast = format in cpu.FORMATS and cpu.unavailable() is None and forced() in (None, "cpu")
        return "fp32 products of decoded values" if fast else "reference: fp32 products of decoded values"
    if activation == "fp8" and format == "mxfp4" and capability == (9, 0):
        return "decoded, exact: FP8 tensor cores"
    if activation != "same":
        how = "rounded" if format == "int8" else "exact"
        slow = ", no faster than activations of 16 bits" if activation == "fp8" else ""
        return f"decoded, {how}: BF16 tensor cores{slow}"
    if format == "int4":
        return "emulated, exact: INT8 tensor cores"
    if capability >= (10, 0):
        return "native FP4 tensor cores"
    if capability >= (9, 0) and format == "mxfp4":
        return "emulated, exact: integer dot products up to 4 rows, FP8 tensor cores above"
    return "emulated, exact: integer dot products up to 4 rows, BF16 tensor cores above"


def forced() -> str | None:
    """The provider that `WUSH_PROVIDER` names; None if it is not set; `ConfigError` for an unknown name."""
    name = os.environ.get("WUSH_PROVIDER")
    return one_of("WUSH_PROVIDER", name, NAMES) if name else None


@functools.cache
def resolve(device: int | None) -> dict[str, list[tuple[str, Implementation]]]:
    """Op -> (provider's name, implementation), in the order in which they are asked, for a device; logs them."""
    capability = None if device is None else torch.cuda.get_device_capability(device)
    name = forced()
    table, lines, faults = {}, [], []
    for provider in CPU_PROVIDERS if device is None else PROVIDERS:
        reason = provider.unavailable(capability)
        if isinstance(reason, FixableReason) and name in (None, provider.name):
            faults.append(f"{provider.name} {reason}")
        if reason is None and name not in (None, provider.name):
            reason = f"WUSH_PROVIDER is {name}"
        lines.append(f"{provider.name}: {reason or 'used'}")
        if reason is None:
            for op, implementation in implementations(provider).items():
                table.setdefault(op, []).append((provider.name, implementation))
    if faults:
        used = sorted({entries[0][0] for entries in table.values()}) or ["reference"]
        logger.warning("%s; used instead: %s", "; ".join(faults), ", ".join(used))
    where = "the CPU" if device is None else torch.cuda.get_device_name(device)
    logger.info("providers on %s: %s", where, "; ".join(lines))
    return table


def candidates(op: str, device: int | None, args: tuple) -> list[tuple[str, Implementation]]:
    """The providers of an op on a device, in the order in which they are asked to compute this call."""
    entries = resolve(device).get(op, ())
    return sorted(entries, key=lambda entry: entry[1].prefer_others(*args)) if len(entries) > 1 else list(entries)


def chosen(op: str, device: int | None, args: tuple) -> str | None:
    """The name of the provider that computes a call on a device; None where the reference does."""
    return next((name for name, kernel in candidates(op, device, args) if kernel.refuses(*args) is None), None)


def dispatch(op: str, reference: Callable, *args):
    """Computes `op` by the first provider that takes the call on the first argument's device, else by `reference`."""
    device = args[0].device.index
    for entry in candidates(op, device, args):
        name, implementation = entry
        if implementation.refuses(*args) is not None:
            continue
        try:
            return implementation.run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if forced() is not None:
                raise
            if op in IN_PLACE:
                raise RuntimeError(
                    f"{name} failed in {op} and may have left its state half written: set "
                    "WUSH_PROVIDER=reference and start again"
                ) from error
            result = reference(*args)  # raises if the arguments are at fault; then the provider is not
            resolve(device)[op].remove(entry)
            logger.warning(
                "%s failed in %s and is no longer used for it: %s: %s",
                name,
                op,
                type(error).__name__,
                str(error).split("\n")[0],
            )
            return result
    return reference(*args)
