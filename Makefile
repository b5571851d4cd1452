# From a fresh checkout: `make demo`, `make test`, `make check`. The first of them makes .venv and installs afa into it.
# Which build of torch pip takes (CPU, CUDA …) is its index's affair: set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to choose.

BIN := .venv/bin
INSTALLED := .venv/.installed
NAMES := python3 python3.14 python3.13 python3.12 python3.11
RECENT := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help demo test check docs dist check-dist clean
.DEFAULT_GOAL := help

help: ## say what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(INSTALLED) ## see the whole path on small embedded experts; leaves demo/report.html
	$(BIN)/afa demo

# What the tests of a file share is made once, where one worker runs all of them.
test: $(INSTALLED) ## run the tests, two at a time, without a network
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED) ## lint everything, check the types of the core
	$(BIN)/ruff check .
	$(BIN)/mypy

# Not --quiet: with it MkDocs counts no warnings, and strict means nothing.
docs: .venv/.docs-installed ## build the documentation as a site; leaves site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html; to search in it, too: $(BIN)/python -m http.server -d site"

dist: $(INSTALLED) ## build the sdist, and of it the wheel; leaves them in dist/
	$(BIN)/python scripts/dist.py build

check-dist: $(INSTALLED) ## build both, and try the wheel in an environment of its own
	$(BIN)/python scripts/dist.py check

clean: ## remove the environment, the demonstration and all that was built
	rm -rf .venv demo build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Done again when the dependencies change. PYTHON names an interpreter; by default the first of NAMES that is recent.
$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for name in $(or $(PYTHON),$(NAMES)); do \
	    if "$$name" -c '$(RECENT)' >/dev/null 2>&1; then echo "$$name -m venv .venv"; exec "$$name" -m venv .venv; fi; \
	  done; \
	  echo "afa needs Python 3.11 or later, found none among: $(or $(PYTHON),$(NAMES)). Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

.venv/.docs-installed: $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	@touch $@
