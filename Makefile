# make train   installs into .venv and runs the digits recipe     make test   passes the tests
PYTHON ?= python3
GPU_PYTHON ?= python3
RECIPE ?= digits
BIN := .venv/bin
INSTALLED := .venv/.installed
NATIVE := .venv/.native

.PHONY: train test slow peers lint types bench gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-full wheel

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,digits,dev]'
	touch $@ $(NATIVE)

# an editable install does not see that csrc changed
$(NATIVE): $(INSTALLED) setup.py $(wildcard csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

train: $(NATIVE)
	$(BIN)/r1v2-fast train $(RECIPE)

test: $(NATIVE)
	$(BIN)/python -m pytest -m "not slow and not gpu" --ignore tests/peers

slow: $(NATIVE)
	$(BIN)/python -m pytest -m slow --ignore tests/peers

# verl pins other releases of its dependencies, and its wheel holds a package named tests: it stands apart
VERL := .venv/verl
$(VERL): $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt trl liger-kernel ray tensordict omegaconf codetiming orjson
	$(BIN)/python -m pip install --quiet --no-deps --target $@ verl==0.9.1

peers: $(VERL) $(NATIVE) # our ops against TRL's, Liger's and verl's own code
	PYTHONPATH=$(VERL) $(BIN)/python -m pytest tests/peers

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

bench: $(VERL) $(NATIVE) # TRL, Liger and verl's losses are the peers that run on the CPU
	PYTHONPATH=$(VERL) $(BIN)/python -m bench

KERNELS := linear_logprob linear_logprob_rows linear_logprob_grads linear_logprob_sparse group_advantage policy_loss mpo_loss
TOOLS := memcheck racecheck initcheck synccheck
SANITIZER := compute-sanitizer --error-exitcode 1

gpu: gpu-build gpu-test gpu-sanitize gpu-bench # with a CUDA device, nvcc and GPU_PYTHON's torch; needs no network

gpu-build:
	R1V2_FAST_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	$(GPU_PYTHON) -m pytest -m gpu --ignore tests/peers

gpu-sanitize: gpu-build
	for tool in $(TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(GPU_PYTHON) -m pytest -m gpu -k "not 16777217 and not graph" \
	    tests/test_native.py tests/test_priority_index.py || exit 1; \
	  for kernel in $(KERNELS); do \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool $$tool $(GPU_PYTHON) tests/kernel_checks/$$kernel.py cuda || exit 1; \
	  done; done

gpu-bench: # tune first: the row kernel's launch parameters are part of what is measured
	$(GPU_PYTHON) -m bench tune
	$(GPU_PYTHON) -m bench --device cuda --output bench/results/gpu.jsonl
	$(GPU_PYTHON) -m pytest bench/host_overhead.py

gpu-full: # whole steps with random weights: R1V2-38B on one GPU of 141 GB, InternVL3-1B on any
	$(GPU_PYTHON) -m bench.full_step r1v2-38b-one-gpu --output bench/results/gpu.jsonl
	$(GPU_PYTHON) -m bench.full_step internvl3-1b --output bench/results/gpu.jsonl
	$(GPU_PYTHON) -m bench.grpo_step --device cuda --output bench/results/gpu.jsonl

wheel: $(INSTALLED) # an sdist, and a manylinux wheel for every CPython at hand; R1V2_FAST_CUDA=auto|1|0
	$(BIN)/python tools/wheels.py
