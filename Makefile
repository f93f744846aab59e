# SPDX-License-Identifier: Apache-2.0
# Every target works as the first command in a fresh clone: it makes .venv and builds what it needs.
# SIDECHAIN_NATIVE=0 leaves the native libraries out; SIDECHAIN_CUDA=auto|0|1 decides on CUDA.

PYTHON ?= python3
CXX ?= g++
# Pinned in every pip line, so that no dependency can pull in another (CUDA) build.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check $(TORCH)
PEERS := .venv-peers
PEER_PIP := $(PEERS)/bin/python -m pip install --progress-bar off --disable-pip-version-check $(TORCH)
# What a lent GPU host has, as far as `bench/gpu.sh` needs it; diffusers and sparsify come as wheels.
GPUHOST := .venv-gpuhost
GPUHOST_HAS := torch==2.11.0 triton==3.6.0 pytest pytest-xdist pytest-timeout hypothesis numpy \
  transformers peft accelerate pandas scipy matplotlib safetensors jinja2 einops requests
GPUHOST_PYTHON := $(shell command -v python3.12 >/dev/null && python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo $(PYTHON))
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py
FORMATTED := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST_FLAGS ?=
# One test process for each core; `make test-python WORKERS=0` runs all in one, for a debugger.
WORKERS ?= $(shell nproc)
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE ?= 1

ifneq ($(SIDECHAIN_NATIVE),0)
ifeq ($(shell command -v $(CXX)),)
$(info sidechain: no C++ compiler ($(CXX)) found: installing without native kernels; `apt-get install g++` brings them)
export SIDECHAIN_NATIVE := 0
endif
endif
ifeq ($(SIDECHAIN_NATIVE),0)
INSTALLED := $(VENV)/.installed-python
else
INSTALLED := $(VENV)/.installed-native
endif

.PHONY: demo test test-python test-native lint types bench bench-ops bench-hooks bench-sharing bench-demo bench-sae peers gpu-rehearsal kernels-report zoo-music zoo-sae zoo-sae-table install clean

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/sidechain demo --out runs/demo

test: lint types test-native test-python

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/lint-imports

types: $(INSTALLED)
	$(BIN)/mypy

test-native: $(INSTALLED)
ifeq ($(SIDECHAIN_NATIVE),0)
	@echo "test-native: skipped, native code is switched off"
else
	$(BIN)/cmake --build build/cmake --target native_tests
	$(BIN)/ctest --test-dir build/cmake -j 2 --output-on-failure --no-tests=error
	@grep -h '^emulation: .* kernels x\|planted bugs' build/cmake/Testing/Temporary/LastTest.log
endif

test-python: $(INSTALLED)
	$(PYTEST) $(PYTEST_FLAGS)
	TRITON_INTERPRET=1 $(PYTEST) tests/triton $(PYTEST_FLAGS)

# One result file for each machine; a newer run replaces the older one of the same work.
bench: bench-ops bench-hooks bench-sharing

bench-ops: $(INSTALLED)
	$(BIN)/sidechain bench ops --threads 1 --json bench/results

# Whole generations: with all threads, as a study runs.
bench-sharing bench-demo: bench-%: $(INSTALLED)
	$(BIN)/sidechain bench $* --json bench/results

# Peers want packages that a user of sidechain does not: an environment on top of ours.
bench-hooks: $(PEERS)/.installed
	$(PEERS)/bin/python -W ignore -m sidechain bench hooks --threads 1 --json bench/results

bench-sae: $(PEERS)/.installed
	$(PEERS)/bin/python -W ignore -m sidechain bench sae --threads 1 --json bench/results
	$(BIN)/sidechain bench store --threads 1 --json bench/results

peers: $(PEERS)/.installed

$(PEERS)/.installed: pyproject.toml $(INSTALLED)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -c 'import sysconfig; here = sysconfig.get_path("purelib"); \
	  open(here + "/base.pth", "w").write( \
	    "import site; site.addsitedir(%r)" % here.replace("/$(PEERS)/", "/$(VENV)/"))'
	$(PEER_PIP) eai-sparsify==1.3.3 sae-lens==6.54.12 einops pymongo openai tomlkit \
	  pydantic-settings json-repair cattrs more-itertools jaxtyping
	$(PEER_PIP) nnsight==0.8.1
	$(PEER_PIP) --no-deps --pre overcomplete==0.3.0 llamascopium==2.0.0b34 dictionary-learning==0.1.0
	@touch $@

# All that a GPU host runs, with its versions of everything and without our Python's own module.
gpu-rehearsal: $(GPUHOST)/.installed $(INSTALLED)
	PYTHON=$(CURDIR)/$(BIN)/python bench/gpu.sh pack
	PYTHON=$(CURDIR)/$(GPUHOST)/bin/python bench/gpu.sh rehearse

$(GPUHOST)/.installed: Makefile
	$(GPUHOST_PYTHON) -m venv $(GPUHOST)
	$(GPUHOST)/bin/python -m pip install --progress-bar off --disable-pip-version-check $(GPUHOST_HAS)
	@touch $@

# Flags of the report go into REPORT: make kernels-report REPORT='--sort per_element --only tap'
REPORT ?=
kernels-report: $(INSTALLED)
	$(BIN)/cmake --build build/cmake --target emulation_order
	$(BIN)/python -W ignore tests/build/kernels_report.py $(REPORT)

zoo-music: $(INSTALLED)
	$(PIP) --no-deps tinysoundfont
	$(BIN)/python -m sidechain.zoo.recipes

zoo-sae: $(INSTALLED)
	$(BIN)/python -m sidechain.zoo.recipes.train_sae

# Every architecture at its defaults, for the card of the dictionaries: minutes.
zoo-sae-table: $(INSTALLED)
	$(BIN)/python -m sidechain.bench.architectures --card --out bench/results/sae/architectures.json

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sidechain: expected python3 >= 3.11 (apt package python3; or make PYTHON=...)," \
	    "got $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "sidechain: $(PYTHON) -m venv failed: apt-get install python3-venv"; exit 1; }
	@echo "== build tools and $(TORCH)"
	$(PIP) 'setuptools>=77' wheel cmake ninja 'pybind11>=3.0'
	@touch $@

$(VENV)/.dependencies: pyproject.toml | $(VENV)/.tools
	@echo "== sidechain and its dependencies, pure Python"
	SIDECHAIN_NATIVE=0 $(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.installed-python: $(VENV)/.dependencies
	@touch $@

$(VENV)/.installed-native: $(VENV)/.dependencies $(NATIVE_SOURCES)
	@echo "== native libraries"
	$(BIN)/python setup.py build_ext --inplace
	@touch $@
