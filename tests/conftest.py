"""What all test files share: threads, the hypothesis profile, skips of GPU tests, and the reasons of skips."""

import collections
import logging
import os
import shutil
import subprocess

import hypothesis
import pytest
import torch

# The tensors are tiny. One thread computes them faster than two that wait for each other, and files run in parallel.
torch.set_num_threads(1)
# pytest 9.2 adds its handler to loggers that do not propagate. PyTorch's trace log is on as soon as it has a handler:
# every trace would be written out, and would take ten times as long.
logging.getLogger("torch.__trace").propagate = True
# Derandomized: a red test is red for everyone. The exhaustive tables cover most, so few examples are enough.
hypothesis.settings.register_profile("wush", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("wush")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: `pytest -m gpu` on a machine that has one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """One line for each reason to skip tests, with the number of tests."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")


@pytest.fixture
def shared_libstdcxx(monkeypatch, tmp_path):
    """AOTInductor compiles with a g++ whose libraries use the process's libstdc++.

    A g++ that links its own libstdc++ makes packages that crash when they are loaded, whatever they hold: `std::regex`
    then gets a facet of the other libstdc++.
    """
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
