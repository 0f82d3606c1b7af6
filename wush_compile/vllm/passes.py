"""The execution passes of `torch.compile(backend="wush")` in vLLM's own compile."""

import hashlib
import logging

from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import CompilationMode, get_current_vllm_config_or_none

from ..backend import cache_key
from ..graphs.printing import count_ops
from ..passes import pipeline

log = logging.getLogger("wush_compile")
SLOT = "post_grad_custom_pre_pass"  # vLLM's own passes run behind it, in `post_grad_custom_post_pass`


class ExecutionPasses(InductorPass):
    """The execution passes, behind `first`, the user's own pass."""

    def __init__(self, first: InductorPass | None = None):
        self.first = first

    def __call__(self, graph: Graph) -> None:
        if self.first is not None:
            self.first(graph)
        changes = pipeline.run(graph)
        counts = (changes | count_ops(graph)).items()
        log.info("execution passes: %s", ", ".join(f"{name}: {count}" for name, count in counts if count))

    def uuid(self) -> str:
        """Enters the keys of vLLM's and Inductor's caches."""
        key = cache_key(pipeline.EXECUTION), None if self.first is None else self.first.uuid()
        return hashlib.sha256(repr(key).encode()).hexdigest()


def enable() -> None:
    """Puts the passes into the compile of the model that is being built, once.

    vLLM builds the layers before it reads `inductor_compile_config`, whose passes enter its cache keys.
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.compilation_config.mode == CompilationMode.NONE:
        return
    options = config.compilation_config.inductor_compile_config
    if not isinstance(options.get(SLOT), ExecutionPasses):
        options[SLOT] = ExecutionPasses(options.get(SLOT))
