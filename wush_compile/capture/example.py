"""Names, dtypes and shapes of a model's inputs: small enough for a checkpoint, enough to trace the model again."""

import torch
from torch import Tensor

from ..data import Batch
from ..errors import CheckpointError

# (sequences, tokens) that token ids are cut to: a trace of a few is the trace of many.
TOKENS = (2, 8)


def describe_batch(batch: Batch) -> dict | None:
    """`{"names": [..] or None, "dtypes": [..], "shapes": [..]}`, JSON-ready; None where an input is no tensor."""
    values = list(batch.values()) if isinstance(batch, dict) else list(batch)
    if not all(isinstance(value, Tensor) for value in values):
        return None
    return {
        "names": list(batch) if isinstance(batch, dict) else None,
        "dtypes": [str(value.dtype).removeprefix("torch.") for value in values],
        "shapes": [list(value.shape) for value in values],
    }


def build_batch(example: dict, device: torch.device | str) -> Batch:
    """Zeros with the names, dtypes and shapes that `describe_batch` found.

    Where all inputs are integers of one shape [B, S], as token ids and their masks are, the zeros have the shape
    [2, at most 8]. Raises `CheckpointError` for an example that is none.
    """
    try:
        names, shapes = example["names"], [tuple(shape) for shape in example["shapes"]]
        dtypes = [getattr(torch, dtype) for dtype in example["dtypes"]]
        if len(set(shapes)) == 1 and len(shapes[0]) == 2 and not any(d.is_floating_point for d in dtypes):
            shapes = [(TOKENS[0], min(TOKENS[1], shapes[0][1]))] * len(shapes)
        values = [torch.zeros(s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]
        return tuple(values) if names is None else dict(zip(names, values, strict=True))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the example inputs in the checkpoint's report cannot be read ({error}): quantize the model again"
        ) from error
