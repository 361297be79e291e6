# Every target wraps one command that you can type yourself; `make setup` is all the others need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATASET ?= demo
STORE ?= features/$(basename $(notdir $(DATASET))).zarr
WORKERS ?= 2
COUNT ?= 1500

.DEFAULT_GOAL := help
.PHONY: help installed setup demo download extract fit eval test test-all quick test-oldest faults soak check lint format typecheck bench fuzz dist

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## Make a virtual environment in .venv with everything in it, development tools included

# The demo and the three stages need less than development does.
RUNS := $(if $(wildcard $(VENV)/ready),$(VENV)/ready,$(VENV)/ready-demo)

$(VENV)/ready-demo: EXTRAS = demo
$(VENV)/ready: EXTRAS = demo,dev
$(VENV)/ready $(VENV)/ready-demo: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another, as in make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Setting up $(VENV); pip takes some minutes over PyTorch ..."
	$(PYTHON) -m venv $(VENV)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(RUNS) ## The whole pipeline on the embedded data: extract, fit, evaluate, report
	$(BIN)/sail-eval demo

download: $(RUNS) ## Download a training set's images: make download DATASET=cc3m (sail-extract check cc3m says what for)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[download]'
	$(BIN)/sail-extract download $(DATASET)

extract: $(RUNS) ## Encode a data set into a store: make extract DATASET=demo, or DATASET=cc12m DOWNLOAD=yes to download it first
	$(if $(filter-out no,$(DOWNLOAD)),$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[download]')
	$(BIN)/sail-extract run $(DATASET) --out $(STORE) $(if $(filter-out no,$(DOWNLOAD)),--download)

fit: $(RUNS) ## Train the heads on a store: make fit DATASET=demo (or STORE=features/demo.zarr)
	$(BIN)/sail-align fit --features $(STORE)

eval: $(RUNS) ## Score the newest run on every evaluation set that is there
	$(BIN)/sail-eval all

test: setup ## Run the tests, two at a time (WORKERS=8 for more)
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m "not thorough"

test-all: setup ## Run all tests, also those that take half a minute and more each
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal

quick: setup ## Run the quick tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist=worksteal -m "not slow and not thorough"

# uv alone can resolve to the lowest versions.
test-oldest: ## Run the quick tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable ".[demo,dev]"
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist=worksteal -m "not slow and not thorough"

# Runs are forks of one process, which must not have threads.
HARNESS = PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

faults: setup ## Fail small jobs at operations on the disk, rerun them, compare bytes (COUNT=1500 of 10,500)
	@$(HARNESS).injections --count $(COUNT) --workers $(WORKERS) $(if $(JOBS),--jobs $(JOBS)) $(if $(ONLY),--only '$(ONLY)')

soak: MINUTES ?= 10
soak: setup ## Kill small jobs at random moments, rerun them, compare bytes (MINUTES=10, SEED=7)
	@$(HARNESS).soak --minutes $(MINUTES) --workers $(WORKERS) $(if $(JOBS),--jobs $(JOBS)) $(if $(SEED),--seed $(SEED))

fuzz: MINUTES ?= 5
fuzz: setup ## Read changed files of every kind: make fuzz MINUTES=5 SEED=1 (or FUZZ_ONLY=tar:12345 for one input)
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --seed $(or $(SEED),0) --only "$(FUZZ_ONLY)"

check: lint typecheck quick ## Check style and types, and run the quick tests

lint: installed ## Check style, formatting and the directions of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/installed && PYTHONPATH=. ../../$(BIN)/lint-imports --no-logo --no-cache ../../pyproject.toml

format: setup ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Neither import-linter nor mypy can follow folders that are mapped to another name.
installed: setup
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/installed .

typecheck: installed ## Check types on the package as it installs
	cd build/installed && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p sail_align

bench: setup ## Measure speed and memory; each benchmark prints ratios against a baseline in the same run
	@for name in bench_index extract stream loss step evaluate segmentation; do \
		echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py || exit 1; done

dist: ## Build the wheel and the source distribution in dist/ and check them as PyPI does
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet --disable-pip-version-check build twine auditwheel
	rm -rf dist
	build/dist/bin/python -m build
	build/dist/bin/twine check --strict dist/*
	@[ "$$(uname)" != Linux ] || build/dist/bin/auditwheel show dist/*.whl | tr '\n' ' ' | grep -o 'tag: "manylinux_2_[0-9]*_[a-z0-9_]*"'
