# demo: from nothing to a measured model.  lint: style and types.
# test: all tests, on two cores; four processes, since two of them mostly wait for clusters (tests/conftest.py).
# bench: start-up and speed against the others, checkpoints, batch sizes, loaders.
# faults: provoke every fault that a run is to survive, and write docs/faults.md.
# docs: the documentation as a site, in site/.
# test-gpu: what only a GPU can show (one will do, eight are used), and images per second against the plain loop.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test test-gpu lint docs bench faults clean

$(VENV)/demo: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[demo]'
	touch $@

$(VENV)/installed: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/demo
	rm -rf $(RUN)
	$(BIN)/launch recipes/quickstart.yaml --run-dir $(RUN)

test: $(VENV)/installed
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m tests.bench.gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/mkdocs build

bench: $(VENV)/installed
	$(BIN)/python -m tests.bench.startup
	$(BIN)/python -m tests.bench.checkpoint
	$(BIN)/python -m tests.bench.autotune
	$(BIN)/python -m tests.bench.uneven
	$(BIN)/python -m tests.bench.features
	$(BIN)/python -m tests.bench.loaders
	$(BIN)/python -m tests.bench.engine_cost
	$(BIN)/python -m tests.bench.tracking
	$(BIN)/python -m tests.bench.peers
	$(BIN)/python -m tests.bench.serving

faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
