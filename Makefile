# Every target makes the environment it needs; run it again and only what is missing is done.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Importing torch takes three times as long where Python is kept from writing bytecode, as in many containers.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow faults lint format clean

help:
	@echo "make demo       set up, then train and compare two tokenizers on built-in photographs (about ten minutes)"
	@echo "make test       set up, then run the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make faults     the slow tests of processes that die, disks that fill, inputs that are damaged"
	@echo "make lint       style, types, import layers"
	@echo "make clean      remove the environment"

$(VENV)/installed: pyproject.toml
	@echo "== making the environment in $(VENV) (torch and its CUDA libraries: about 6 GB)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vqpipe needs Python 3.11 or newer; try: make PYTHON=python3.12 demo")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --editable '.[dev,fast]'
	@touch $@

demo: $(VENV)/installed
	@echo "== the demo: every stage, small"
	@$(BIN)/vqpipe demo

test: $(VENV)/installed
	@echo "== the fast tests"
	@$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(VENV)/installed
	@$(BIN)/python -m pytest -m slow

faults: $(VENV)/installed
	@$(BIN)/python -m pytest -m slow -s tests/faults tests/training/test_faults.py

lint: $(VENV)/installed
	@echo "== style, types, import layers"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layers.py

format: $(VENV)/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV)
