# make demo   set everything up and watch a model solve a Sudoku
# make test   set everything up and run the tests
# make check  formatting, lint and types
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PUZZLE := 53..7.912 6..195..8 198...567 .5.76..23 4.68.3.91 7.39.4..6 9615..284 2.74196.5 3..28.1.9

.PHONY: demo test test-slow test-gpu check clean

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

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/ready-test: .venv/ready
	$(PIP) --editable ".[test]"
	touch $@

clean:
	rm -rf .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache
