# Everything runs in .venv, which `make install` builds from pyproject.toml: in the releases of CONSTRAINTS, or in those
# that pip chooses where it is empty (make install CONSTRAINTS=).
PYTHON ?= python3
TESTED := constraints/tested.txt
CONSTRAINTS ?= $(TESTED)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install lint test mutants soak demo bench evidence clean
.DELETE_ON_ERROR:

help:
	@echo "make install   create .venv and install tinyclip with its development tools"
	@echo "make lint      ruff and pyright"
	@echo "make test      lint, then pytest"
	@echo "make mutants   plant mistakes in a copy of the package, one at a time, and list those that no test catches"
	@echo "make soak      stop and continue small runs at FAULTS random points (300) and compare what they leave"
	@echo "make demo      shrink a small CLIP on generated pictures"
	@echo "make bench     the tables of RESULTS.md that are timings"
	@echo "make evidence  those on real pairs; DATA is the folder of the data sets"
	@echo "make clean     remove .venv and caches"

install: $(INSTALLED)

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "installing tinyclip and its development tools into .venv (several GB with torch; some minutes the first time)"
	$(PYTHON) -m venv .venv
	@echo "$(CONSTRAINTS)" > .venv/.constraints
	$(INSTALL) $(CONSTRAINTS:%=--constraint %) || \
	  { echo "$(CONSTRAINTS) does not fit this machine: pip chooses" | tee .venv/.constraints; $(INSTALL); }
	@touch $@

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@if [ "$$(cat .venv/.constraints)" = "$(TESTED)" ]; then $(BIN)/pyright; \
	else echo "pyright: left out, since types are those of $(TESTED)"; fi

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --maxprocesses 4 --dist loadfile

mutants: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

FAULTS ?= 300
SEED ?= 0
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --faults $(FAULTS) --seed $(SEED)

demo: install
	$(BIN)/tinyclip demo

bench: install
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/loss.py > benchmarks/results/loss.jsonl
	$(BIN)/python benchmarks/step.py > benchmarks/results/step.jsonl
	$(BIN)/python benchmarks/inference.py > benchmarks/results/inference.jsonl
	$(BIN)/python benchmarks/data.py > benchmarks/results/data.jsonl
	$(BIN)/python docs/generate.py

DATA ?= data
evidence: install
	$(BIN)/python examples/emoji.py $(DATA)/emoji-demo --run runs/emoji --seeds 3
	$(BIN)/python examples/flickr8k.py $(DATA)/flickr8k-train --run runs/flickr8k --seeds 3
	$(BIN)/python examples/measure.py $(DATA) --runs runs

clean:
	rm -rf .venv .pytest_cache .ruff_cache build src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
