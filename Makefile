# gcpo_repro. `make help` lists the targets.
#
# PYTHON  interpreter for the virtual environment (3.11 is the tested one)
# VENV    folder of the virtual environment
# INDEX   an additional package index, to choose the build of torch, e.g. https://download.pytorch.org/whl/cpu

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
INDEX ?=
PROFILE ?= cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install reproduce test test-all lint constraints clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else "Python %d.%d is too old: gcpo_repro needs 3.11 or newer, e.g. make PYTHON=/path/to/python3.11" % v)'
	@echo "== installing into $(VENV): pip install -c constraints.txt -e .[dev]"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(if $(INDEX),--extra-index-url $(INDEX)) -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/installed  ## virtual environment with the tested versions

reproduce: install  ## the main job: the notebooks in the cpu profile (PROFILE=smoke is shorter), results in runs/
	@echo "== gcpo-repro reproduce --profile $(PROFILE)"
	$(BIN)/gcpo-repro reproduce --profile $(PROFILE)

test: install lint  ## lint, ordinary tests, then the notebooks in the smoke profile
	@echo "== ordinary tests, two at a time"
	$(BIN)/python -m pytest -n 2
	@echo "== notebooks, smoke profile"
	$(BIN)/python -m pytest -m notebooks

test-all: test  ## the slow tests as well
	@echo "== slow tests"
	$(BIN)/python -m pytest -m slow

lint: install  ## ruff and mypy
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/mypy

constraints: install  ## write constraints.txt from the versions installed now
	@{ echo "# regenerate: pip install -U -e '.[dev]' && make constraints   (freezes the tested versions, without local version labels)"; \
	  $(PIP) freeze --exclude-editable | sed -E 's/\+[A-Za-z0-9.]+$$//' | grep -v '@ file:'; } > constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
