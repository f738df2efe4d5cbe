# Sets up a virtual environment in .venv and runs the demo and the checks in it.
# Needs Python 3.11 or newer, make and pip.

PYTHON ?= python3
# What pip installs as torch, options included. To choose another build:
#   make demo TORCH=torch                                 the newest, with CUDA on Linux
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell grep '^torch==' constraints.txt)
# The same for test-versions, which keeps an environment for each and for each Python:
#   make test-versions PYTHON=python3.12 NEWEST=torch==2.14.1
OLDEST ?= $(shell sed -n '/^ *"torch>=/{s/>=/==/;s/[" ]//g;s/,$$//p}' pyproject.toml)
NEWEST ?= torch
# More arguments for the command that a target runs: make test ARGS="-k split"
ARGS ?=

VENV := .venv
VENV_OLDEST := .venv-oldest-$(notdir $(PYTHON))
VENV_NEWEST := .venv-newest-$(notdir $(PYTHON))
LIBRARY := tests invertible --ignore=tests/examples --ignore=tests/benchmarks
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One for each core, yet no more than four: each takes up to 2 GB, and 12 seconds to begin.
PROCESSES := --numprocesses auto --maxprocesses 4 --dist worksteal
SPHINX := $(BIN)/python -m sphinx -W --keep-going -n -q -E

export TORCH

.DEFAULT_GOAL := help
# All targets install into one environment, and two pips at once would break it.
.NOTPARALLEL:

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

.PHONY: demo
demo: $(STAMPS)/demo ## Train a small i-RevNet on handwritten digits and decode them back
	@echo "Loading PyTorch, then training for half a minute."
	$(BIN)/python examples/irevnet/train_imagenet.py $(ARGS)

.PHONY: test
test: $(STAMPS)/test ## Run the tests, the examples in docstrings and the code in the docs
	HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest $(PROCESSES) $(ARGS)

.PHONY: test-versions
test-versions: ## Run the tests of the library on the oldest torch it takes and on the newest
	$(MAKE) test VENV=$(VENV_OLDEST) TORCH="$(OLDEST)" ARGS="$(LIBRARY) $(ARGS)"
	$(MAKE) test VENV=$(VENV_NEWEST) TORCH="$(NEWEST)" ARGS="$(LIBRARY) $(ARGS)"
	@for venv in $(VENV_OLDEST) $(VENV_NEWEST); do $$venv/bin/python -c \
		'import sys, torch; print("passed: Python", *sys.version.split()[:1], "torch", torch.__version__)'; \
	done

.PHONY: lint
lint: ruff types ## Check style and types

.PHONY: ruff
ruff: $(STAMPS)/dev ## Check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: $(STAMPS)/dev ## Check types, strictly
	$(BIN)/mypy

.PHONY: docs
docs: $(STAMPS)/docs ## Build the documentation in docs/_build/html, warnings being errors
	$(SPHINX) -b html docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

.PHONY: linkcheck
linkcheck: $(STAMPS)/docs ## Try the links that lead out of the documentation
	$(SPHINX) -b linkcheck -D plot_gallery=0 docs docs/_build/linkcheck

.PHONY: clean
clean: ## Remove all that make made, .venv included; runs/ stays
	rm -rf .venv .venv-* docs/_build docs/learn dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "invertible needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1)." \
			"Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Rewritten only when another torch is asked for than last time.
$(STAMPS)/torch-choice: $(STAMPS)/venv FORCE
	@echo "$$TORCH" | cmp -s - $@ || echo "$$TORCH" > $@

.PHONY: FORCE
FORCE:

# torch by itself and first; the constraints then keep what follows from replacing it.
$(STAMPS)/torch: $(STAMPS)/torch-choice constraints.txt
	$(PIP) install $$TORCH
	@grep -v '^torch==' constraints.txt > $(STAMPS)/constraints.txt
	@$(PIP) freeze | grep '^torch==' >> $(STAMPS)/constraints.txt || true
	@touch $@

EXTRAS := demo test docs dev
$(EXTRAS:%=$(STAMPS)/%): $(STAMPS)/%: $(STAMPS)/torch pyproject.toml
	$(PIP) install -c $(STAMPS)/constraints.txt -e '.[$*]'
	@touch $@
