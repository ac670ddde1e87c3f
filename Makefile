PYTHON ?= python3
VENV ?= .venv
# Processes that run tests.
JOBS ?= 2
# Further arguments of pip, such as an index that has the CPU build of torch.
PIP_FLAGS ?=
# Further arguments of pytest.
PYTEST_FLAGS ?=

SANITIZER := compute-sanitizer --error-exitcode 9 --launch-timeout 120 --target-processes application-only
# What stays quick, and reaches every kernel: racecheck slows it down a hundredfold.
SANITIZED := latent or tiles and (bfloat16 or pages or many or knobs) or one_sequence and odd and bfloat16

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

# Errors inside TVM come with their C++ frames.
export TVM_BACKTRACE ?= 1

.DEFAULT_GOAL := help
.PHONY: help demo lint check fix test nightly gpu sanitize bench snapshots wheel

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED) ## Follow one sparse attention variant from definition to kernel
	$(BIN)/python examples/dsa_story.py

lint: $(INSTALLED) ## Run ruff, mypy and the import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint ## Run lint and the unit tests
	$(BIN)/pytest tests/unit -n $(JOBS) $(PYTEST_FLAGS)

fix: $(INSTALLED) ## Format, and repair what ruff can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(INSTALLED) ## Run the tests that need no GPU
	$(BIN)/pytest tests/unit tests/compile -m "not nightly" -n $(JOBS) $(PYTEST_FLAGS)

nightly: $(INSTALLED) ## Run those too that are much like others
	$(BIN)/pytest tests/unit tests/compile -n $(JOBS) $(PYTEST_FLAGS)

gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/pytest tests -m gpu $(PYTEST_FLAGS)

sanitize: $(INSTALLED) ## Run small cases of every GPU schedule under compute-sanitizer
	for tool in memcheck racecheck; do \
	  $(SANITIZER) --tool $$tool $(BIN)/python -m pytest tests/gpu/test_tiles_gpu.py tests/gpu/test_latent.py \
	    tests/gpu/test_patterns_gpu.py -k "$(SANITIZED)" $(PYTEST_FLAGS) || exit; \
	done

bench: $(INSTALLED) ## Measure this machine into benchmarks/results
	$(BIN)/python -m benchmarks.run

snapshots: $(INSTALLED) ## Rewrite the stored texts, then show what changed
	$(BIN)/pytest tests/unit tests/compile --update-snapshots $(PYTEST_FLAGS)
	git diff --stat tests/snapshots

wheel: $(INSTALLED) ## Build into dist/, install in a fresh environment and import
	$(BIN)/pytest tests/compile/test_wheel.py
	rm -rf build  # setuptools would ship a deleted module from there
	$(BIN)/python -m pip wheel --quiet $(PIP_FLAGS) --no-deps --no-build-isolation -w dist .
