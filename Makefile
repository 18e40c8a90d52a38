# Every target sets itself up: the first one makes .venv with pinned packages, later ones start at once.
# PYTHONS narrows the choice of interpreter (make test PYTHONS=3.12), CONFIG names another experiment.
PYTHONS ?= 3.13 3.12 3.11
CONFIG  ?= configs/stdlib.py
WORKERS ?= 2

SET_UP = pyproject.toml constraints.txt constraints-floor.txt tools/make_venv.sh tools/find_python.sh
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --durations 15 --durations-min 5

.PHONY: help setup train test test-fast test-all lint format bench wheel floor tpu tpu-all gpu gpu-all clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/installed  ## make .venv only

train: .venv/installed  ## train the model of CONFIG (configs/stdlib.py: minutes on two cores) and show what it learned
	@echo "training $(CONFIG); stop at any time, the same command resumes"
	@.venv/bin/striate train $(CONFIG)

test: .venv/installed  ## run the tests that take seconds to a minute each
	@echo "running all tests but those marked slow"
	@$(PYTEST) -m "not slow and not tpu and not gpu"

test-fast: .venv/installed  ## run the tests that take seconds, within three minutes
	@echo "running all tests but those marked slow or long"
	@$(PYTEST) -m "not slow and not long and not tpu and not gpu"

test-all: .venv/installed  ## run every test but those of `make tpu` and `make gpu`
	@echo "running every test, the slow ones too"
	@$(PYTEST) -m "not tpu and not gpu"

lint: .venv/installed  ## check style and formatting
	@echo "ruff: lint and format"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: .venv/installed  ## put the files in the form that lint asks for
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

bench: .venv/installed  ## measure attention against jax.nn.dot_product_attention
	@echo "benchmarking attention, forward and backward"
	@.venv/bin/python benchmarks/attention.py

wheel: .venv/installed  ## build the wheel into dist/
	@echo "building the wheel into dist/"
	@rm -rf build
	@.venv/bin/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls dist/*.whl

floor: .venv-floor/installed  ## run the smoke tests on the oldest supported Python and JAX
	@echo "smoke tests on Python 3.11 and jax 0.10.2"
	@.venv-floor/bin/python -m pytest -m smoke
	@.venv-floor/bin/striate --help > /dev/null

tpu: .venv-compilers/installed  ## compile with the compiler of TPUs, which needs no TPU, and check what comes out
	@echo "compiling for TPUs that are not here"
	@.venv-compilers/bin/python -m pytest -n $(WORKERS) --durations 5 --durations-min 5 -m "tpu and not slow"

tpu-all: .venv-compilers/installed  ## the same for every mask on every chip
	@echo "compiling all there is for TPUs that are not here"
	@.venv-compilers/bin/python -m pytest -n $(WORKERS) --durations 5 --durations-min 5 -m tpu

gpu: .venv-compilers/installed  ## compile with the compiler of GPUs, which needs no GPU, and run what comes out
	@echo "compiling for GPUs that are not here"
	@.venv-compilers/bin/python -m pytest -n $(WORKERS) --durations 5 --durations-min 5 -m "gpu and not slow"

gpu-all: .venv-compilers/installed  ## the same for every mask, score and width
	@echo "compiling all there is for GPUs that are not here"
	@.venv-compilers/bin/python -m pytest -n $(WORKERS) --durations 5 --durations-min 5 -m gpu

clean:  ## remove what the targets made, except runs/
	rm -rf .venv .venv-floor .venv-compilers .cache .hypothesis .pytest_cache .ruff_cache build dist striate.egg-info

.venv/installed: $(SET_UP)
	@tools/make_venv.sh .venv $(PYTHONS)

.venv-floor/installed: $(SET_UP)
	@tools/make_venv.sh .venv-floor 3.11

.venv-compilers/installed: $(SET_UP)
	@EXTRAS=dev,tpu,gpu-compiler,emulator tools/make_venv.sh .venv-compilers $(PYTHONS)
