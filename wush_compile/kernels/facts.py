"""What kernels remember of a weight, and how that follows the weight when it is written.

Facts are kept with the memory of the weight. A call that finds a weight written since then computes them again. But a
captured CUDA graph replays without Python: it holds the addresses of remembered tensors, and what remembered answers
decided. So facts are computed again into the same memory, and `refresh` does so at once. Whoever writes weights that
captured graphs read calls it: `load_state_dict` of our modules, and vLLM's plug-in.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import WushError

logger = logging.getLogger("wush_compile")
# Attributes of a storage.
FACTS = "_wush_facts"  # Place -> name of a fact -> Fact
USED = "_wush_used"  # Place -> version of the weight at its last use

Value = Tensor | bool | tuple  # of a tuple, each item is a tensor or a bool


class Place(NamedTuple):
    """Which dense tensor of a storage."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Fact:
    """A remembered value.

    make       computes it from the weight; a function that holds no tensor, which would keep its own memory alive
    version    of the weight when it was computed
    captured   whether a CUDA graph was captured with it
    """

    __slots__ = ("captured", "make", "value", "version")

    def __init__(self, make: Callable[[Tensor], Value], value: Value, version: tuple):
        self.make, self.value, self.version, self.captured = make, value, version, False

    def renew(self, t: Tensor, version: tuple) -> bool:
        """Computes the value again, tensors in their memory. Returns whether captured graphs stay right: a graph that
        was captured while an answer was True is wrong once it is False."""
        with torch.inference_mode(False), torch.no_grad():
            old, new = _items(self.value), _items(self.make(t))
            items = tuple(a.copy_(b) if isinstance(a, Tensor) else b for a, b in zip(old, new, strict=True))
        right = not (self.captured and any(a is True and b is False for a, b in zip(old, items)))
        self.value = _like(self.value, items)
        self.version = version
        return right


def _items(value: Value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _like(value: Value, items: tuple) -> Value:
    if not isinstance(value, tuple):
        return items[0]
    return value._make(items) if hasattr(value, "_make") else items


def _version(t: Tensor) -> tuple:
    """Changes when `t` is written. Tensors of inference mode do not count; `x.data` counts for itself."""
    return -1 if t.is_inference() else t._version, t.data_ptr()


def _place(t: Tensor) -> Place:
    return Place(t.storage_offset(), t.shape, t.dtype)


def _kept(t: Tensor, attribute: str) -> dict:
    """An attribute of the tensor's storage."""
    return t.untyped_storage().__dict__.setdefault(attribute, {})


def capturing(t: Tensor) -> bool:
    """Whether work on `t` goes into a CUDA graph."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _warn_capturing() -> None:
    logger.warning(
        "a weight is used for the first time, or since it was written, while a CUDA graph is captured: it runs on a "
        "slower kernel in that graph; run the model once before capturing"
    )


def lasting(make: Callable, device: torch.device):
    """`make()`, with tensors that may be kept. While Inductor warms up a CUDA graph, memory allocated on this thread
    joins the graph's pool and is reclaimed with it. So another thread allocates."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return make()
    stream = torch.cuda.current_stream(device)

    def elsewhere():
        with torch.cuda.stream(stream), torch.no_grad():
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(elsewhere).result()


def remembered(t: Tensor, name: str, make: Callable[[Tensor], Value], instead: Callable[[Tensor], Value]) -> Value:
    """`make(t)` of a dense weight; remembered.

    While a CUDA graph is captured, nothing is computed that is kept: if it is not known, `instead(t)` is the answer,
    whose work is part of the graph.
    """
    facts, version = _kept(t, FACTS).setdefault(_place(t), {}), _version(t)
    fact = facts.get(name)
    if capturing(t):
        if fact is None or fact.version != version:
            _warn_capturing()
            return instead(t)
        fact.captured = True
        return fact.value
    if fact is None:
        with torch.inference_mode(False), torch.no_grad():  # else it could not be renewed outside of inference mode
            fact = facts[name] = Fact(make, lasting(functools.partial(make, t), t.device), version)
    elif fact.version != version and not fact.renew(t, version):
        logger.warning("%s", STALE)
    return fact.value


STALE = (
    "the new weights do not fit a kernel that CUDA graphs were captured with: their scales span a wider range than "
    "those before; capture the graphs again (vLLM: start it anew, or use enforce_eager=True)"
)


def refresh(tensors: Iterable[Tensor]) -> None:
    """Computes again, in its memory, all that is remembered of weights that were written. CUDA graphs that were
    captured before then replay with the new weights.

    Raises `WushError` if such a graph cannot: then it must be captured again.
    """
    right, seen = True, set()
    for t in tensors:
        storage = t.untyped_storage()
        if not hasattr(storage, FACTS) or storage.nbytes() == 0 or storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        getattr(storage, USED, {}).clear()
        number, start = _version(t)[0], storage.data_ptr()
        for place, facts in getattr(storage, FACTS).items():
            weight = torch.empty(0, dtype=place.dtype, device=t.device).set_(storage, place.offset, place.shape)
            version = number, start + place.offset * place.dtype.itemsize
            right &= all([fact.renew(weight, version) for fact in facts.values()])  # noqa: C419 (each of them)
    if not right:
        raise WushError(STALE)


def mark_used_and_were_settled(*weights: Tensor) -> bool:
    """Returns whether each weight was used before and has not been written since; records the use of all of them.

    Only after True may a kernel read the weights before the kernel in front ends: that one might write them. All are
    recorded at once: a CUDA graph is captured in the second call, and must get True."""
    settled = True
    for t in weights:
        used, place, version = _kept(t, USED), _place(t), _version(t)
        settled &= used.get(place) == version
        used[place] = version
    return settled
