# Every target makes the virtual environment it needs. A stamp file per set of extras says what is
# installed, so that a second run starts at once and `make demo` installs little.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=
# A further package index for pip, e.g. one with CPU-only builds of torch.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A BLAS that starts its own threads beside torch's and pytest's oversubscribes the cores, and
# makes sums depend on the machine. SCIPY_ARRAY_API: without it scikit-learn skips a check silently.
TEST_ENV := OMP_NUM_THREADS=1 SCIPY_ARRAY_API=1 MPLBACKEND=Agg
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format docs bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  the interpreter of the virtual environment ($(VENV))"
	@echo "  TORCH_INDEX=URL   a further package index, e.g. one with CPU-only builds of torch"
	@echo "  PYTEST_ARGS=...   passed to pytest, e.g. PYTEST_ARGS='-k aecm --cov'; JOBS=$(JOBS) processes"
	@echo "  DEEPMIX_DATA=DIR  a folder with data sets, for demo, docs and bench"

demo: $(VENV)/.stamp-plot ## Cluster handwritten digits: a table and a picture, in minutes
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/.stamp-test ## Run the tests, without those marked slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp-test ## Run the tests marked slow
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint ## Check style, formatting, the import contracts and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(VENV)/.stamp-lint ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs ## Build the documentation, warnings are errors
	MPLBACKEND=Agg $(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.stamp-plot ## Run the benchmarks in their quick form
	$(BIN)/python benchmarks/run.py --quick
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed/overhead.py --quick

clean: ## Remove the virtual environment and everything generated
	rm -rf $(VENV) build dist *.egg-info .coverage htmlcov docs/_build docs/auto_examples docs/generated
	rm -rf .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
	find deepmix tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a range in a later command would draw a newer build, gigabytes of CUDA.
$(VENV)/.stamp-torch: constraints.txt | $(VENV)/bin/python
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.stamp-plot $(VENV)/.stamp-test $(VENV)/.stamp-docs: $(VENV)/.stamp-%: $(VENV)/.stamp-torch pyproject.toml
	$(PIP) --editable ".[$*]"
	@touch $@

# The linters read the source and import nothing of it: no torch here.
$(VENV)/.stamp-lint: constraints.txt | $(VENV)/bin/python
	$(PIP) ruff import-linter mypy
	@touch $@
