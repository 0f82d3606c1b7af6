"""What every test file shares: threads, the hypothesis profile, and the skip of tests that need a GPU."""

import logging
import os
import shutil
import subprocess

import hypothesis
import pytest
import torch

# The tensors are tiny: one thread computes them faster than two that wait for each other, and the files run side by side.
torch.set_num_threads(1)
# pytest 9.2 hangs its handler on loggers that do not propagate, and PyTorch's trace log is on as soon as it has a handler:
# every trace would be written out, and take ten times as long.
logging.getLogger("torch.__trace").propagate = True
# Derandomized: a red test is red for everyone. The exhaustive tables carry the load, so few examples will do.
hypothesis.settings.register_profile("wush", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("wush")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def shared_libstdcxx(monkeypatch, tmp_path):
    """AOTInductor compiles with a g++ whose libraries use the process's libstdc++. One that links its own makes packages that
    crash on loading, whatever is in them: `std::regex` meets a facet of the other libstdc++."""
    source, library = tmp_path / "regex.cpp", tmp_path / "regex.so"
    source.write_text(
        '#include <regex>\nextern "C" bool match(const char* t) { return std::regex_match(t, std::regex("[a-z]+")); }\n'
    )
    for compiler in (os.environ.get("CXX"), "g++", "/usr/bin/g++"):
        if compiler and shutil.which(compiler):
            done = subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], capture_output=True)
            if done.returncode == 0 and b"libstdc++.so" in library.read_bytes():
                monkeypatch.setenv("CXX", compiler)
                monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, compiler))
                return
    pytest.skip("no g++ that links libstdc++ dynamically")
