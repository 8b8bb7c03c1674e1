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
.PHONY: help demo test test-beside test-lowest test-newest test-quick test-extras mutate lint types docs site clean

help:
	@echo "make demo    install, then inspect, convert, verify and run the bundled checkpoint"
	@echo "make test    install what tests need and run the whole suite"
	@echo "make mutate  break lines of the package one at a time, and report which faults the tests find"
	@echo "make test-beside RELEASE=1.2   run it with what TensorRT-LLM 1.0, 1.2 or 1.3 pins, in an environment of its own"
	@echo "make test-lowest, test-newest   run it with the oldest and the newest releases of its dependencies"
	@echo "make test-quick ENVIRONMENT=lowest   run it with what a file in constraints/ pins, but with the torch of .venv"
	@echo "make test-extras RELEASE=1.2   let pip find releases for each extra beside what TensorRT-LLM pins; install nothing"
	@echo "make lint    check style, formatting and the order of imports"
	@echo "make types   check types"
	@echo "make docs    write the generated pages anew: support matrix, every class, recipes, troubleshooting, notebook, why"
	@echo "make site    write these pages and the docstrings as a site for a browser, into build/site"
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
# Environments beside .venv, one for each file in constraints/. PIP_CONSTRAINT takes the place of constraints in pip's
# own configuration, which may cap a release that the file asks for.
test-beside:
	@test -f constraints/tensorrt-llm-$(RELEASE).txt || { \
	  echo "Name a release, for instance: make test-beside RELEASE=1.2"; ls constraints; exit 1; }
	@$(MAKE) --no-print-directory test-in ENVIRONMENT=tensorrt-llm-$(RELEASE)

test-lowest test-newest: test-%:
	@$(MAKE) --no-print-directory test-in ENVIRONMENT=$*

environment = .venvs/$(ENVIRONMENT)

.PHONY: test-in
test-in: $(environment)/.installed
	@$(environment)/bin/python -m pip list --format=freeze | grep -E '^(torch|numpy|transformers|numba)=='
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(environment)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -q $(PYTEST_ARGS)

.venvs/%/.installed: constraints/%.txt pyproject.toml
	@$(PYTHON) -m venv .venvs/$*
	@echo "Installing into .venvs/$* (PyTorch is large: this takes some minutes) ..."
	@PIP_CONSTRAINT=constraints/$*.txt .venvs/$*/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

# The same without torch, which is the large part: on top of .venv, what the file pins of numpy, transformers and the
# command line's packages. compressed-tensors stays too, because its older releases ask for an older torch. A path file
# inside another environment's site-packages is not followed, so the editable install of .venv stays out of sight.
quick = .venvs/quick-$(ENVIRONMENT)
site = import sysconfig; print(sysconfig.get_path("purelib"))

test-quick: $(venv)/.dev-installed
	@$(python) -m venv --clear $(quick)
	@$(python) -c '$(site)' | xargs realpath > "$$($(quick)/bin/python -c '$(site)')/dependencies.pth"
	@grep -vE '^(torch|compressed-tensors)[=<>]' constraints/$(ENVIRONMENT).txt > $(quick)/constraints.txt
	@PIP_CONSTRAINT=$(quick)/constraints.txt $(quick)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@$(quick)/bin/python -m pip list --format=freeze | grep -E '^(torch|numpy|transformers|typer)=='
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(quick)/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -q $(PYTEST_ARGS)

# What pip would install, by the metadata of packages alone; pip before 23.2 would download the packages themselves.
EXTRAS ?= compressed-tensors reference mpi test dev
test-extras: $(venv)/.created
	@for extra in $(EXTRAS); do \
	  PIP_CONSTRAINT=constraints/tensorrt-llm-$(RELEASE).txt $(python) -m pip --python $(PYTHON) install --quiet \
	    --disable-pip-version-check --dry-run --ignore-installed ".[$$extra]" && echo "$$extra: resolves" || exit 1; \
	done

lint: $(venv)/.dev-installed
	$(venv)/bin/ruff check .
	$(venv)/bin/ruff format --check .
	$(venv)/bin/lint-imports --no-cache

types: $(venv)/.dev-installed
	$(venv)/bin/mypy

# docs/why.md is made from real checkpoints, docs/performance.md from measurements (`python -m benchmarks`).
docs: $(venv)/.dev-installed
	$(python) docs/generate_support_matrix.py
	$(python) docs/generate_every_class.py
	$(python) docs/generate_recipes.py
	TRTLLM_CT_WRITE_DOCS=1 $(python) -m pytest -q tests/docs/test_troubleshooting.py tests/test_notebook.py
ifdef TRTLLM_CT_SHARED
	$(python) docs/generate_why.py $(TRTLLM_CT_SHARED)/checkpoints
else
	@echo "docs/why.md is left as it is: set TRTLLM_CT_SHARED to the folder of real checkpoints to write it."
endif

# A link that leads nowhere, a page outside of the navigation or a fault that docs/check_site.py finds ends it; with
# --quiet, mkdocs would not be strict.
site: .venvs/site/.pages-installed
	NO_MKDOCS_2_WARNING=1 .venvs/site/bin/mkdocs build --strict
	@echo "The site is build/site/index.html."

.venvs/site/.pages-installed: docs/requirements.txt
	@$(PYTHON) -m venv .venvs/site
	@.venvs/site/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	@touch $@

$(venv)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)."; \
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
	rm -rf $(venv) .venvs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
