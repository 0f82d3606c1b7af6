"""The ordered lists of execution passes, which `torch.compile(backend="wush")` and `wush_compile.fuse` run.

A pass takes an FX graph of ATen and wush ops, edits it in place, and returns the number of its changes.
"""

import functools
from collections.abc import Callable

from torch import Tensor
from torch.fx import Graph, Node

from .execution.cleanup import cleanup
from .execution.cse import cse
from .execution.drop_copies import drop_copies
from .execution.drop_identities import drop_identities
from .execution.fuse_activation import fuse_activation
from .execution.fuse_epilogue import fuse_epilogue
from .execution.fuse_norm import fuse_norm
from .execution.lay_out_scales import lay_out_scales
from .execution.lower import lower
from .execution.merge_siblings import merge_siblings
from .execution.package import package
from .execution.quantize_before_views import quantize_before_views

_ALWAYS: tuple[Callable[[Graph], int], ...] = (
    drop_identities,  # dropout in eval mode
    cse,  # one quantizer for each distinct input
    drop_copies,  # quantizers that only copy: 16 bits without a transform
    merge_siblings,  # one matmul for each group of siblings
    fuse_epilogue,  # bias and residual adds into the matmul
    quantize_before_views,  # norms that experts reshape
    fuse_norm,  # RMSNorm, LayerNorm into the quantizer
    fuse_activation,  # SiLU·up, GELU·up, GELU, ReLU, .. into the quantizer
    cleanup,  # no-op views, paddings, dead code
    lower,  # fused ops that the target device has no kernel for
)
EXECUTION = (
    *_ALWAYS,
    lay_out_scales,  # scales as the products of the target device read them
)
# For a program that has to run without Python: packaged kernels read scales in rows.
PACKAGING = (
    *_ALWAYS,
    package,  # no wush op is left
)


def packaging(weight_of: Callable[[Node], Tensor | None]) -> tuple[Callable[[Graph], int], ...]:
    """`PACKAGING` for a program whose weights are known, as `package` takes them."""
    with_weights = functools.wraps(package)(functools.partial(package, weight_of=weight_of))
    return tuple(with_weights if step is package else step for step in PACKAGING)


def run(
    graph: Graph,
    passes: tuple[Callable[[Graph], int], ...] = EXECUTION,
    after: Callable[[str, Graph], None] | None = None,
) -> dict[str, int]:
    """Runs passes in order, in place, and calls `after(name, graph)` behind each. Pass name -> number of changes."""
    changes = {}
    for step in passes:
        changes[step.__name__] = step(graph)
        if after is not None:
            after(step.__name__, graph)
    graph.lint()
    return changes
