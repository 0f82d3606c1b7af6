# Everything a fresh machine needs: `make demo` runs the main job, `make test` the tests,
# `make cuda` builds the CUDA kernels for every GPU of csrc/build.py (needs nvcc 12.9 or newer; objects are cached).
PYTHON ?= python3
# Which PyTorch to install. On Linux the plain name also brings CUDA's libraries, several gigabytes;
# `make TORCH=torch test` takes it all the same.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo lint test docs figures cuda cuda-check bench clean

demo: $(VENV)/ready
	$(BIN)/wush-compile demo

# What every commit keeps: style, and imports that point one way.
lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The site in build/site. A broken link or a missing reference is an error (with --quiet mkdocs would not count it).
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The tables and numbers of README.md and docs/ from benchmarks/results/*.json; a test fails where they differ.
figures: $(VENV)/ready
	$(BIN)/python -m pip install --quiet "matplotlib>=3.8"
	$(BIN)/python benchmarks/figures.py

# Of nvidia-cutlass only the headers are used.
cuda: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0
	$(BIN)/python csrc/build.py

# One product for each target that takes CUTLASS, for the tests to look at; they build the others themselves.
cuda-check: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --no-deps nvidia-cutlass==4.2.0
	$(BIN)/python csrc/build.py --targets sm_100a sm_103a --only linear_sm100_nvfp4_narrow --jobs 1

bench: $(VENV)/ready
	$(BIN)/python benchmarks/compile_overhead.py

# The stamp is newer than pyproject.toml only once everything in it is installed.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
