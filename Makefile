# Every target makes the environment it needs; run it again and only what is missing is done.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FAST   := -n auto --dist worksteal -m "not slow"

# Importing torch takes three times as long where Python is kept from writing bytecode, as in many containers.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-slow faults gpu lint format docs upgrade test-newest test-lowest clean

help:
	@echo "make demo         set up, then train and compare two tokenizers on built-in photographs (about five minutes)"
	@echo "make test         set up, then run the fast tests"
	@echo "make test-slow    the tests that take minutes"
	@echo "make faults       the slow tests of processes that die, disks that fill, inputs that are damaged"
	@echo "make gpu          tests and measurements on a GPU, without network (DRY=1: the same, small, on the CPU)"
	@echo "make lint         style, types, import layers"
	@echo "make docs         the documentation as a site, in site/"
	@echo "make upgrade      write constraints.txt anew and run everything with it"
	@echo "make test-newest  the fast tests with the newest versions of everything; any deprecation fails"
	@echo "make test-lowest  the fast tests with the lowest versions that pyproject.toml allows"
	@echo "make clean        remove the environments and the site"

# $(call environment,FOLDER,OPTIONS): a virtual environment with vqpipe in it, installed by uv with these options.
define environment
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vqpipe needs Python 3.11 or newer; try: make PYTHON=python3.12 demo")'
@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
@$(1)/bin/python -m uv pip install --quiet --python $(1)/bin/python $(2) --editable '.[dev]'
endef

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "== making the environment in $(VENV) (torch and its CUDA libraries: about 8 GB)"
	$(call environment,$(VENV),--constraints constraints.txt --build-constraints constraints.txt)
	@touch $@

demo: $(VENV)/installed
	@echo "== the demo: every stage, small"
	@$(BIN)/vqpipe demo

test: $(VENV)/installed
	@echo "== the fast tests"
	@$(BIN)/python -m pytest $(FAST)

test-slow: $(VENV)/installed
	@$(BIN)/python -m pytest -m slow

faults: $(VENV)/installed
	@$(BIN)/python -m pytest -m slow -s tests/faults tests/training/test_faults.py

# With the Python of the environment if there is one, else with that of the machine: it may have no network.
gpu:
	@PYTHON=$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) stages/runs/gpu/run.sh

lint: $(VENV)/installed
	@echo "== style, types, import layers"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest tests/test_layers.py

format: $(VENV)/installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build  # without a notice about other site generators
	@echo "open $(CURDIR)/site/index.html"

upgrade: $(VENV)/installed
	@sed '/^[^#]/,$$d' constraints.txt > constraints.new
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra dev --no-header --no-annotate pyproject.toml >> constraints.new
	@mv constraints.new constraints.txt
	@$(MAKE) test lint test-slow
	@git diff --stat constraints.txt
	@echo "== all passed with these versions: commit constraints.txt"

test-newest:
	$(call environment,$(VENV)-newest,--upgrade)
	@$(VENV)-newest/bin/python -m pytest $(FAST) -W error::DeprecationWarning -W error::PendingDeprecationWarning -W error::FutureWarning

test-lowest:
	$(call environment,$(VENV)-lowest,--resolution lowest-direct)
	@$(VENV)-lowest/bin/python -m pytest $(FAST)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-lowest site
