# make demo   set everything up and watch a model solve a Sudoku
# make test   set everything up and run the tests
# make check  formatting, lint and types
# make docs   the documentation site, into build/site
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PUZZLE := .16....9. 45...72.. ..8..6731 .69.34..5 .4579.... ...5.24.9 ..1.4...7 ...1893.. .8.67....

.PHONY: demo test test-slow test-gpu check docs clean

demo: .venv/ready
	$(BIN)/dgemma run sudoku --visual --pace 0.4 --prompt "$(PUZZLE)"

test: .venv/ready-test
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: .venv/ready-test
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/ready-test
	$(BIN)/python -m pytest -m gpu

check: .venv/ready-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/ready-docs
	$(BIN)/python docs/notebook.py
	$(BIN)/python docs/pages.py
	$(BIN)/zensical build --strict

.venv/ready: pyproject.toml constraints.txt $(wildcard dgemma/kernels/*.[ch])
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) --editable ".[test]"
	touch $@

.venv/ready-docs: .venv/ready
	$(PIP) --editable ".[docs,serve]"
	touch $@

clean:
	rm -rf .venv build *.egg-info dgemma/kernels/*.so .mypy_cache .ruff_cache .pytest_cache
