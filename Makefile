# Two commands on a fresh machine with Python 3.11+, a C++ compiler and make:
#   make demo    set up .venv, take the embedded model through the whole line
#   make test    set up .venv, run the tests
# Both set up once; afterwards they install again only where pyproject.toml, constraints.txt or the C++ changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
NATIVE := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/* csrc/*/*)

# Every installation is held to constraints.txt, what builds the wheel included.
INSTALL := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.PHONY: demo test lint types clean

demo: $(VENV)/.demo
	$(BIN)/lowbit demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --dist worksteal

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(NATIVE) | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.test: $(NATIVE) tests/peers.txt | $(BIN)/python
	$(INSTALL) --editable '.[test]'
	-$(INSTALL) --no-deps --requirement tests/peers.txt
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
