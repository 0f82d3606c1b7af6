"""`when_imported`: work that waits for the import of another library, so that ours need not import it."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls `action` once the module is there."""

    def __init__(self, name: str, action: Callable[[], object]):
        self.name, self.action = name, action

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module) -> None:
                run(module)
                self.action()

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Calls `action` now if the module `name` is imported already, otherwise at the end of its import."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))
