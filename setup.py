"""Puts the kernels that `csrc/build.py` built into the wheel. Without them the wheel fits every platform.

Everything else about the package is in pyproject.toml.
"""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

LIBRARIES = sorted((Path(__file__).parent / "build" / "csrc").glob("libwush_*.so"))


class BuildPy(build_py):
    def run(self):
        super().run()
        if LIBRARIES and not self.editable_mode:  # an editable install finds them in the build folder
            directory = Path(self.build_lib) / "wush_compile" / "kernels" / "lib"
            directory.mkdir(parents=True, exist_ok=True)
            for library in LIBRARIES:
                self.copy_file(str(library), str(directory / library.name))


class Wheel(bdist_wheel):
    def get_tag(self):
        """The libraries depend on the platform and on torch's stable ABI, but not on Python's version or ABI."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if LIBRARIES else (python, abi, platform)


class Package(Distribution):
    def has_ext_modules(self):
        return bool(LIBRARIES)


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel}, distclass=Package)
