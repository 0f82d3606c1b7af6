"""Lets transformers load checkpoints of wush_compile in a process that has not imported it: `transformers serve`, a
`pipeline`, lm_eval.

PyTorch calls `install` at the end of `import torch`, by the entry point in the group "torch.backends" (its autoload
mechanism; TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns that off). It imports nothing: once transformers has its table of
quantizers, "wush" is a name in it, and wush_compile is imported when a checkpoint asks for it. This file is no part of
the package, for to import the package is to register its ops.
"""

import importlib.abc
import importlib.util
import sys

TABLE = "transformers.quantizers.auto"
# One of these two is imported after torch, whichever of transformers' modules is the one that imports torch.
LATER = (TABLE, "transformers.modeling_utils")


class _OnDemand:
    """Stands for the class of our `quantization_config` in transformers' table, and is replaced at its first use."""

    @classmethod
    def from_dict(cls, settings: dict, *args, **kwargs):
        from wush_compile.checkpoint.hf import WushHfConfig  # registers itself and the quantizer

        return WushHfConfig.from_dict(settings, *args, **kwargs)


def _registered() -> bool:
    """Puts the name into transformers' table, if the table is there."""
    table = getattr(sys.modules.get(TABLE), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if table is not None:
        table.setdefault("wush", _OnDemand)
    return table is not None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds two modules as the other finders do, and registers once one of them is there."""

    def find_spec(self, name, path=None, target=None):
        if name not in LATER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                if _registered() and self in sys.meta_path:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Registers the quantization method "wush" with transformers now, or once transformers is imported."""
    if not _registered():
        sys.meta_path.insert(0, _Finder())
