# make demo       set up, then go from demonstrations to an exported policy
# make test       set up, then run the tests, except those marked slow
# make test-slow  set up, then run the tests marked slow
# make check      set up, then check style, types and import layers
# make clean      remove the environment and all caches
# For another Python: make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.DEFAULT_GOAL := setup

.PHONY: help demo test test-slow check setup clean

# One process per core with one thread each: torch's own threads would only compete.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --dist loadfile

help:
	@sed -n 's/^# //p;/^$$/q' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/imagewam demo --out imagewam-demo

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
