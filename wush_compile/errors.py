"""The library's own errors. Each message is one sentence that names the thing and the remedy."""

import difflib
from collections.abc import Iterable

# Choices that an error lists. A model has more modules than anyone reads.
MOST_NAMED = 24


class WushError(Exception):
    """The base of all errors of wush_compile. The message says what to do."""


class ConfigError(WushError, ValueError):
    """A setting that does not exist or does not fit."""


class DataError(WushError, ValueError):
    """Calibration or evaluation data that cannot be used."""


class CaptureError(WushError, RuntimeError):
    """The model could not be traced, or has nothing to quantize."""


class NonFiniteError(WushError, ArithmeticError):
    """NaN or Inf where finite numbers are needed. The message names the layer."""


class CheckpointError(WushError, ValueError):
    """A directory or file that is not a complete, readable wush checkpoint."""


class OffsetsError(WushError, ValueError):
    """Offsets of experts' rows that are not sorted, or go past the rows."""


class SignatureError(WushError, TypeError):
    """A function that computes an op but does not take the op's arguments."""


class GradientError(WushError, RuntimeError):
    """A gradient is asked of an op that has none."""


def one_of(kind: str, value: object, allowed: Iterable[str | None]) -> str | None:
    """Returns `value` if it is one of `allowed`. Otherwise raises `ConfigError` with the nearest match."""
    allowed = tuple(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), filter(None, allowed), n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    more = f", and {len(allowed) - MOST_NAMED} more" if len(allowed) > MOST_NAMED else ""
    raise ConfigError(f"unknown {kind} {value!r}{hint} (one of: {', '.join(map(str, allowed[:MOST_NAMED]))}{more})")
