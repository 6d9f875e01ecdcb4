# `make test` and `make train` make what they need in .venv; nothing outside this folder is written, except
# pip's cache. `make` alone lists the targets.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPES := $(VENV)/types
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# The C++ kernels are compiled by the installation, so a change in them, or in how they are told apart, repeats it.
SOURCES := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.inc) kernels/sources.py

.DEFAULT_GOAL := help
.PHONY: help install train test lint types format bench tables clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo '  ARGS="..." is handed on by train, test, bench and tables; PYTHON=... names the interpreter of .venv'

install: $(STAMP) ## make .venv with the pinned packages and this package, editable

# torch comes first, and the package without build isolation: its C++ kernels are compiled against the torch
# that runs them. ninja, which torch's build looks for, is on the PATH only inside the environment.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools wheel ninja torch
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e '.[train,test,dev,triton]'
	@touch $@

$(VENV)/.peers: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -c constraints.txt --no-build-isolation -e '.[peers]'
	@touch $@

train: $(STAMP) ## train ResNet-20-v2 on the handwritten digits, fused beside plain
	$(BIN)/python -m fused_preact.train --compare $(ARGS)

# Two processes of pytest: Triton's interpreter has to be on before the kernels are imported and off on a GPU. The
# GPU's come first, so that the last line is the summary of tests that ran. Exit status 5 is "no test has the
# marker". One thread for each worker; loadgroup keeps tests that share a costly fixture in one.
test: lint types ## lint, types, then all tests; those that need a GPU are skipped without one
	PATH="$(CURDIR)/$(BIN):$$PATH" \
		$(BIN)/python -m pytest -m gpu -q -rN --benchmark-disable $(ARGS) || [ $$? -eq 5 ]
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m 'not gpu' -n $(WORKERS) --dist loadgroup --benchmark-disable --durations=10 $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# mypy does not follow the mapping of kernels/ to fused_preact.kernels: it reads a folder of links which has it.
types: $(STAMP) ## mypy on the package and its kernels
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/fused_preact
	@ln -s $(CURDIR)/fused_preact/* $(CURDIR)/kernels $(TYPES)/fused_preact/
	cd $(TYPES) && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

format: $(STAMP) ## ruff: repair what it can, then format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Every CPU table of docs/performance.md in about 35 minutes on two cores, then the page. Repeat the command after an
# interruption: finished stages of this commit are skipped.
tables: $(VENV)/.peers ## every CPU table of docs/performance.md, about 35 minutes on two cores; resumable
	$(BIN)/python -m benchmarks cpu $(ARGS)

bench: $(STAMP) ## python -m benchmarks, for example: make bench ARGS=compile
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .ninja_deps .ninja_log kernels/_cpu.* .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find fused_preact kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
