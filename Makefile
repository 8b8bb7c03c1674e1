# `make demo` installs and shows the whole path; `make test` installs what tests need and runs them.
# Everything happens in .venv; a second call installs again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
# Passed on to pytest, for instance: make test PYTEST_ARGS='-k packing'
PYTEST_ARGS ?=
MUTATE_ARGS ?=

venv := .venv
python := $(venv)/bin/python
install := $(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test mutate lint types docs clean

help:
	@echo "make demo    install, then inspect, convert, verify and run the bundled checkpoint"
	@echo "make test    install what tests need and run the whole suite"
	@echo "make mutate  break lines of the package one at a time, and report which faults the tests find"
	@echo "make lint    check style, formatting and the order of imports"
	@echo "make types   check types"
	@echo "make docs    write the generated pages anew: support matrix, troubleshooting, why"
	@echo "make clean   remove .venv and everything that was built"

demo: $(venv)/.demo-installed
	@$(venv)/bin/trtllm-ct demo

# One thread a process: the workers share the cores, and threads that wait for each other would spin. With bytecode, as
# installed packages have it: many tests start processes, which would parse the package anew.
test: $(venv)/.dev-installed
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(python) -m pytest -n auto --maxprocesses 8 --dist worksteal -q $(PYTEST_ARGS)

# Hours of one core; it continues where it stopped. MUTATE_ARGS='--count 20 --only trtllm_ct/layouts' runs less.
mutate: $(venv)/.dev-installed
	nice -n 19 $(python) -m tests.mutation $(MUTATE_ARGS)

lint: $(venv)/.dev-installed
	$(venv)/bin/ruff check .
	$(venv)/bin/ruff format --check .
	$(venv)/bin/lint-imports --no-cache

types: $(venv)/.dev-installed
	$(venv)/bin/mypy

# docs/why.md is made from real checkpoints, docs/performance.md from measurements (`python -m benchmarks`).
docs: $(venv)/.dev-installed
	$(python) docs/generate_support_matrix.py
	TRTLLM_CT_WRITE_DOCS=1 $(python) -m pytest -q tests/docs/test_troubleshooting.py
ifdef TRTLLM_CT_SHARED
	$(python) docs/generate_why.py $(TRTLLM_CT_SHARED)/checkpoints
else
	@echo "docs/why.md is left as it is: set TRTLLM_CT_SHARED to the folder of real checkpoints to write it."
endif

$(venv)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, for instance: make demo PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -m venv $(venv)
	@touch $@

# The constraints pin the tested releases: an unpinned torch may be another one, with gigabytes of GPU libraries.
$(venv)/.demo-installed: $(venv)/.created pyproject.toml constraints.txt
	@echo "Installing into $(venv) (PyTorch is large: this takes a minute or more) ..."
	@$(install) -e '.[reference]'
	@touch $@

$(venv)/.dev-installed: $(venv)/.created pyproject.toml constraints.txt
	@echo "Installing into $(venv) (PyTorch is large: this takes a minute or more) ..."
	@$(install) -e '.[dev]'
	@touch $(venv)/.demo-installed $@

clean:
	rm -rf $(venv) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
