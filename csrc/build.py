"""Builds the kernels: one library for each target, `build/csrc/libwush_<target>.so`; objects are cached.

    python csrc/build.py                              every GPU target, and the CPU
    python csrc/build.py --targets sm_90a sm_120a     some
    python csrc/build.py --targets cpu                the CPU alone: needs a C++ compiler and no nvcc
    python csrc/build.py --only quantize_mxfp4        some sources, compiled and not linked

A source is a .cu or .cpp file of this directory. Lines at its top say what it needs:

    // targets: sm_120a sm_121a         only for these (default: all)
    // uses: cutlass                    the headers of the PyPI package nvidia-cutlass

The sources of the CPU are in cpu/. One with `// levels` at its top is compiled once for each level of instructions.

An object's name holds a hash of all that it is made from: the source, the headers of this directory that it includes,
the command, the compiler's version. What ptxas says of registers, shared memory and spills is kept beside it (`.log`).
Only torch's headers are needed, of any build of torch, a CPU-only one too; the libraries run with every torch from
`TORCH_TARGET` on, since they use its stable ABI alone.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "build" / "csrc"
GPU_TARGETS = ("sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a")
TARGETS = (*GPU_TARGETS, "cpu")
# Level of x86-64 -> its flags, from the least on: the linker takes inline functions of the standard library from the
# first object that has them, which must run everywhere.
LEVELS = {"avx2": ("-march=x86-64-v3",), "avx512": ("-march=x86-64-v4", "-mavx512bf16")}
LEAST_NVCC = (12, 9)
TORCH_TARGET = "0x020b000000000000"  # 2.11


class BuildError(Exception):
    """What is missing or wrong, in one sentence."""


def find_nvcc() -> tuple[str, str]:
    """Path and version ("13.0") of nvcc: on the PATH, under $CUDA_HOME or /usr/local/cuda."""
    found = shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        found = found or (home and shutil.which("nvcc", path=os.path.join(home, "bin")))
    if not found:
        raise BuildError("no nvcc: install the CUDA toolkit 12.9 or newer, or set CUDA_HOME")
    text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < LEAST_NVCC:
        raise BuildError(f"nvcc {version[0]}.{version[1]} at {found} is too old: 12.9 or newer knows all the targets")
    return found, f"{version[0]}.{version[1]}"


def find_cxx() -> tuple[str, str]:
    """Path and version of the C++ compiler: $CXX, or g++ or clang++ on the PATH."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the CPU kernels are written for x86-64, not for {platform.machine()}")
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), None)
    if not found:
        raise BuildError("no C++ compiler: install g++ 12 or newer, or set CXX")
    return found, subprocess.run([found, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def package_directory(name: str, hint: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise BuildError(f"{name} is not installed: {hint}")
    return Path(next(iter(spec.submodule_search_locations)))


def _marks(source: Path, key: str) -> list[str]:
    top = source.read_text().split("\n\n")[0]
    return [word for line in re.findall(rf"^// {key}:(.*)$", top, re.M) for word in line.split()]


def sources(target: str) -> list[Path]:
    """The sources of a target, in the order of their names."""
    if target == "cpu":
        return sorted((HERE / "cpu").glob("*.cpp"))
    every = sorted([*HERE.glob("*.cu"), *HERE.glob("*.cpp")])
    return [s for s in every if target in (_marks(s, "targets") or GPU_TARGETS)]


def levels(source: Path) -> tuple[str, ...]:
    """The levels of instructions for which a source of the CPU is compiled; ("",) for one that does not name any."""
    return tuple(LEVELS) if source.read_text().startswith("// levels\n") else ("",)


def _text_with_headers(source: Path, seen: set[Path]) -> bytes:
    """The source and, once each, the headers of this directory that it includes."""
    seen.add(source)
    text = source.read_bytes()
    for name in re.findall(rb'^\s*#include "([^"]+)"', text, re.M):
        header = source.parent / name.decode()
        if header.exists() and header not in seen:
            text += _text_with_headers(header, seen)
    return text


def _torch_headers() -> list[str]:
    torch = package_directory("torch", "its headers are needed, a CPU-only torch is enough")
    return [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]


def _cpu_command(source: Path, level: str, cxx: str) -> list[str]:
    command = [cxx, "-c", "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    # No fused multiply-add but where the source says so: results are compared bit for bit.
    command += ["-ffp-contract=off", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    return command + ([f"-DWUSH_LEVEL={level}", *LEVELS[level]] if level else _torch_headers())


def _command(source: Path, target: str, nvcc: str) -> list[str]:
    command = [
        nvcc,
        "-c",
        "-O3",
        "-std=c++20",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        f"-DWUSH_TARGET={target}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        "-DUSE_CUDA",
    ]
    if source.suffix == ".cu":
        # No fused multiply-add but where the source says so: results are compared bit for bit.
        arch = target.removeprefix("sm_")
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-fmad=false", "-Xptxas=-v"]
    else:
        command += _torch_headers()
    if "cutlass" in _marks(source, "uses"):
        cutlass = package_directory("cutlass_library", "pip install nvidia-cutlass") / "source"
        command += [f"-I{cutlass / 'include'}", f"-I{cutlass / 'tools/util/include'}", "--expt-relaxed-constexpr"]
    return command


def object_path(
    source: Path, target: str, compiler: str, version: str, out: Path = OUT, level: str = ""
) -> tuple[Path, list[str]]:
    """Where the object of a source for a target lies, and the command that makes it, without `-o`."""
    command = _cpu_command(source, level, compiler) if target == "cpu" else _command(source, target, compiler)
    text = _text_with_headers(source, set()) + " ".join(command[1:]).encode() + version.encode()
    directory = out.parent / "objects" / target
    stem = f"{source.stem}_{level}" if level else source.stem
    return directory / f"{stem}-{hashlib.sha256(text).hexdigest()[:12]}.o", [*command, str(source)]


def compile_object(source: Path, target: str, out: Path = OUT, level: str = "") -> Path:
    """Compiles one source for one target, unless its object is there; ptxas's report is beside it, `.log`."""
    compiler, version = find_cxx() if target == "cpu" else find_nvcc()
    path, command = object_path(source, target, compiler, version, out, level)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.stem[:-13]}-????????????.*"):
        old.unlink()
    part = path.with_suffix(f".{os.getpid()}.part.o")
    run = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if run.returncode:
        part.unlink(missing_ok=True)
        raise BuildError(f"{source.name} does not compile for {target}:\n{run.stdout}{run.stderr}")
    path.with_suffix(".log").write_text(run.stderr)
    part.rename(path)  # complete or absent
    return path


def _digest(target: str) -> str:
    """What the package compares before it loads a library: see `wush_compile/kernels/libraries.py`."""
    path = HERE.parent / "wush_compile" / "kernels" / "libraries.py"
    spec = importlib.util.spec_from_file_location("libraries", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(target)


def link(target: str, objects: list[Path], out: Path = OUT) -> Path:
    """Links a target's objects into `libwush_<target>.so`, unless it is newer than all of them."""
    library = out / f"libwush_{target}.so"
    names = out.parent / "objects" / target / "linked.txt"
    wanted = "\n".join(str(o.name) for o in objects)
    built = library.with_suffix(".sources")
    if library.exists() and names.exists() and names.read_text() == wanted:
        built.write_text(_digest(target))
        return library
    out.mkdir(parents=True, exist_ok=True)
    torch = package_directory("torch", "it is linked against")
    linker = [find_cxx()[0]] if target == "cpu" else [find_nvcc()[0], "-cudart=static"]
    part = library.with_suffix(f".{os.getpid()}.part")
    command = [*linker, "-shared", "-o", str(part), *map(str, objects), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ldl"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise BuildError(f"libwush_{target}.so does not link:\n{run.stderr}")
    part.rename(library)
    built.write_text(_digest(target))
    names.write_text(wanted)
    return library


def build(targets: list[str], only: list[str] | None = None, jobs: int = 2, out: Path = OUT) -> list[Path]:
    """Compiles the sources of the targets, `jobs` at a time; links them, unless `only` names some. The files made."""
    for find in {find_cxx if target == "cpu" else find_nvcc for target in targets}:
        find()
    work = [
        (source, target, level)
        for target in targets
        for source in sources(target)
        if not only or source.stem in only
        for level in (levels(source) if target == "cpu" else ("",))
    ]
    work.sort(key=lambda job: [*LEVELS].index(job[2]) + 1 if job[2] else 0)  # in the order in which they are linked
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda job: compile_object(job[0], job[1], out, job[2]), work))
    if only:
        return objects
    return [link(t, [o for o, (_, target, _) in zip(objects, work, strict=True) if target == t], out) for t in targets]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sources, without their suffix")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="compilers at a time (default 2)")
    args = parser.parse_args()
    try:
        for path in build(args.targets, args.only, args.jobs):
            print(path.relative_to(HERE.parent))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
