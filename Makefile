# make train   installs into .venv and runs the digits recipe     make test   passes the tests
PYTHON ?= python3
GPU_PYTHON ?= python3
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

bench: $(INSTALLED) # TRL and Liger are the peers that run on the CPU
	$(BIN)/python -m pip install --quiet -c constraints.txt trl liger-kernel==0.8.5
	$(BIN)/python -m bench

gpu: # on a machine with a CUDA device, nvcc and GPU_PYTHON's torch; needs no network
	R1V2_FAST_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m pytest -m gpu
	compute-sanitizer --error-exitcode 1 $(GPU_PYTHON) -m pytest -m gpu tests/test_native.py
	$(GPU_PYTHON) -m bench --device cuda --output bench/results/gpu.jsonl

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --sdist
