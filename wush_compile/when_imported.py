"""Work that waits for the import of another library, so that ours need not import it, and modules that do need it."""

import importlib
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


class _First(importlib.abc.MetaPathFinder):
    """Finds nothing, but imports a library when it is asked for a module of a package."""

    def __init__(self, library: str, package: str, besides: tuple[str, ...]):
        self.library, self.package, self.besides = library, package, besides

    def find_spec(self, name, path=None, target=None):
        package, _, rest = name.partition(".")
        if package == self.package and rest.partition(".")[0] not in self.besides:
            sys.meta_path.remove(self)
            importlib.import_module(self.library)
        return None


def import_first(library: str, package: str, besides: tuple[str, ...]) -> None:
    """Imports `library` before any module of `package`, except those in `besides`, which do without.

    What `when_imported` does at the end of that import may import the package's modules: none may be half imported.
    """
    if library not in sys.modules:
        sys.meta_path.insert(0, _First(library, package, besides))
