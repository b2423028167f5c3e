# make train   installs into .venv and runs the digits recipe     make test   passes the tests
PYTHON ?= python3
GPU_PYTHON ?= python3
RECIPE ?= digits
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test slow peers lint types bench gpu gpu-build gpu-test gpu-sanitize gpu-bench wheel

$(INSTALLED): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,digits,dev]'
	touch $@

train: $(INSTALLED)
	$(BIN)/r1v2-fast train $(RECIPE)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" --ignore tests/peers

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow --ignore tests/peers

# verl pins other releases of its dependencies, and its wheel holds a package named tests: it stands apart
VERL := .venv/verl
$(VERL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt trl liger-kernel ray tensordict omegaconf codetiming orjson
	$(BIN)/python -m pip install --quiet --no-deps --target $@ verl==0.9.1

peers: $(VERL) # our ops against TRL's, Liger's and verl's own code
	PYTHONPATH=$(VERL) $(BIN)/python -m pytest tests/peers

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(VERL) # TRL, Liger and verl's losses are the peers that run on the CPU
	PYTHONPATH=$(VERL) $(BIN)/python -m bench

KERNELS := linear_logprob linear_logprob_grads linear_logprob_sparse group_advantage policy_loss mpo_loss
SANITIZER := compute-sanitizer --error-exitcode 1

gpu: gpu-build gpu-test gpu-sanitize gpu-bench # with a CUDA device, nvcc and GPU_PYTHON's torch; needs no network

gpu-build:
	R1V2_FAST_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest -m gpu --ignore tests/peers

gpu-sanitize: gpu-build
	$(SANITIZER) $(GPU_PYTHON) -m pytest -m gpu tests/test_native.py
	for tool in memcheck racecheck initcheck; do for kernel in $(KERNELS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(GPU_PYTHON) tests/kernel_checks/$$kernel.py cuda || exit 1; \
	done; done

gpu-bench: # tune first: the row kernel's launch parameters are part of what is measured
	$(GPU_PYTHON) -m bench tune
	$(GPU_PYTHON) -m bench --device cuda --output bench/results/gpu.jsonl

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel --sdist
