# make demo    the whole walk on shipped pictures, in a few minutes on two cores
# make test    lint, the docs and the quick tests (SLOW=1 runs the slow ones as well)
# make docs    the docs site, into site/, with warnings as errors; no network is needed
# make bench   every benchmark, quickly: make bench DATA=folder_of_federations OUT=folder_for_results
# make clean   remove caches and builds (not .venv, not your runs)
# with TORCH_INDEX=URL  torch is taken from that package index, for example the one PyTorch names for CPU only
# with PYTHON=...       .venv is made with that Python (3.11 or newer)
# with JOBS=...         so many test processes run, each with one thread

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2
OUT ?= runs/bench
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(READY)
	@$(BIN)/autofed demo

test: lint docs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(if $(SLOW),-m "slow or not slow")

lint: $(READY)
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "ruff format: run $(BIN)/ruff format . and look at what changed"; exit 1; }
	@$(BIN)/mypy

docs: $(READY)
	@$(BIN)/zensical build --clean --strict

bench: $(READY)
	@test -d "$(DATA)" || { echo "make bench DATA=FOLDER [OUT=FOLDER]: DATA is the folder that holds the federations (hippocampus, ...)"; exit 1; }
	@for script in $$(find tests/benchmarks -name '[a-z]*.py' | sort); do \
	  echo "== $$script"; $(BIN)/python "$$script" "$(DATA)" -o "$(OUT)/$$(basename "$$script" .py)" --quick; done

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache site
	@find autofed tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, made anew when what it should hold has changed. torch first: see constraints.txt.
$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3.11 python3 python; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "autofed needs Python 3.11 or newer, and found none; install one, or name it: make PYTHON=/path/to/python"; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; "$$found" -m venv $(VENV); \
	fi
	@echo "installing what autofed needs (once)"
	@$(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -c constraints.txt -e ".[dev,docs,flower]"
	@touch $@
