# Everything is run through here, by people and by CI alike.
#
#   make demo           a decode engine on real traffic, checked against exact attention
#   make test           the tests that need no GPU
#   make test-all       the same with all that they compile, of which make test has the telling part
#   make test-oldest    the same on the oldest Triton that is supported, in an environment of its own
#   make test-gpu       the tests that need a GPU
#   make matrix         compile the decode kernels for every architecture, and keep what the compiler said
#   make lint           ruff and mypy
#   make docs           the site of docs/ into build/site, with warnings as errors
#   make format         let ruff rewrite what it can
#   make clean          remove what these made
#
# Variables: PYTHON       the interpreter that makes the environments (3.10 or newer)
#            TORCH_INDEX  one more package index to take torch from, for example
#                         make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
#            JOBS         test processes
#            ARGS         more arguments for pytest or the demo

PYTHON ?= python3
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_READY := $(OLDEST)/.ready
INSTALL := -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES := flashtile compat tests benchmarks examples docs/conf.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest test-gpu matrix lint docs format clean
.DELETE_ON_ERROR:

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(READY)
	@$(BIN)/flashtile demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest tests/cpu -n $(JOBS) -m "not extensive" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest tests/cpu -n $(JOBS) $(ARGS)

test-oldest: $(OLDEST_READY)
	@$(OLDEST)/bin/python -m pytest tests/cpu -n $(JOBS) -m "not extensive" $(ARGS)

test-gpu: $(READY)
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

matrix: $(READY)
	@mkdir -p benchmarks/results
	@$(BIN)/python -m flashtile.testing.matrix --jobs $(JOBS) $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy

docs: $(READY)
	@$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site $(ARGS)
	@echo build/site/docs/index.html

format: $(READY)
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null || { echo "flashtile needs Python 3.10 or newer, and '$(PYTHON)' was not found. Name one: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "flashtile needs Python 3.10 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2])'
endef

# An environment is made once, and again when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(VENV): once, some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[test,dev]'
	@touch $@

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(CHECK_PYTHON)
	@echo "Installing into $(OLDEST): once, some minutes."
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python $(INSTALL) -c constraints-oldest.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(filter-out %.py,$(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +
