# Two commands do everything on a fresh machine:
#   make quickstart   install, train both stages on handwritten digits, show the result
#   make test         install, lint, pass the tests
# Both make .venv when it is missing and install nothing the second time. `make test-long` runs the longer tests.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-long lint install clean

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.installed-test: pyproject.toml .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

install: .venv/.installed

quickstart: .venv/.installed
	$(BIN)/python scripts/quickstart.py

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-long: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

clean:
	rm -rf .venv outputs
