# make setup · demo · test · test-long · torture · fuzz · sanitize · bench · cuda · resources · gpu-check · lint · clean
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-stamp
# What an installed environment depends on: when one of these changes, setup runs again.
INPUTS := constraints.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/host/*.cpp)

.PHONY: setup demo test test-long torture fuzz sanitize bench cuda resources gpu-check lint format clean

setup: $(STAMP)

$(STAMP): $(INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable ".[pipelines,dev]"
	@touch $(STAMP)

demo: setup
	$(BIN)/subnet-kernels demo

# A file of tests to each processor that is free, in the order of their names: those that compile come early.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: setup
	$(BIN)/python -m pytest -m long

# kill -9 at 200 moments of a run and at 200 of a bank that grows, and what comes of it; prints the count.
torture: setup
	PYTHONPATH=.:python_api:tests $(BIN)/python tests/torture.py $(ARGS)

# Hostile files for the decoder, under sanitizers, and for the reader of banks: a minute, or ARGS="--seconds 3600".
fuzz: setup
	PYTHONPATH=.:python_api:tests $(BIN)/python tests/fuzz.py $(ARGS)

# The codec and the CPU kernels under the address and undefined-behaviour sanitizers, and those of their tests that reach every line.
sanitize: setup
	PYTHONPATH=.:python_api:tests $(BIN)/python tests/sanitize.py $(ARGS)

bench: setup
	$(BIN)/python -m pytest bench -s
	$(BIN)/python bench/readme.py

# The CUDA library, by nvcc: neither a GPU nor a PyTorch with CUDA is needed.
cuda: setup
	$(BIN)/python csrc/build.py cuda

# docs/resources.md: registers, shared memory and spills of every GPU kernel, for every target.
resources: cuda
	$(BIN)/python -m pytest tests/test_triton_builds.py
	$(BIN)/python bench/resources.py

# On a machine with a GPU, in whatever Python has PyTorch there: neither a virtual environment nor an install is made.
# make gpu-check ARGS="--only tests,bench --again"
gpu-check:
	PYTHONPATH=.:python_api $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu_check.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp')
	$(BIN)/python bench/readme.py --check
	$(BIN)/python docs/results.py --check
	$(BIN)/python docs/compatibility.py --check

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.cpp')

clean:
	rm -rf build dist subnet_kernels/*.so *.egg-info $(VENV)
