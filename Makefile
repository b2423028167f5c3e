# make train   installs into .venv and runs the digits recipe     make test   passes the tests
PYTHON ?= python3
RECIPE ?= digits
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test slow lint types bench gpu wheel

$(INSTALLED): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,digits,dev]'
	touch $@

train: $(INSTALLED)
	$(BIN)/r1v2-fast train $(RECIPE)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu"

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m bench

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --sdist
