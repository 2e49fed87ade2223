# Every target does its own set-up in .venv, once; needed beforehand: make, a C++ compiler, Python 3.10 or newer with its
# headers and venv. PYTHON=python3.12 chooses another Python (after `make clean`).

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Another torch with CUDA, for make cuda-build; several GB.
TORCH_CUDA := torch==2.14.1
# One is enough there: tests/test_cuda_compile.py compiles the kernels for all.
CUDA_ARCHITECTURES ?= 9.0
VENV_CUDA := .venv-cuda
PIP_CUDA := $(VENV_CUDA)/bin/python -m pip --quiet --disable-pip-version-check
# Fast tests of what the kernels compute on the CPU and of what the registered ops tell torch. They need no checkout.
FAST_TESTS := $(addprefix tests/test_,$(addsuffix .py,cross_entropy nll_loss mse_loss semantics autograd bad_input \
	bounds fake_tensors opcheck grad_in_forward inplace_backward modules))
# Two processes, each with a file at a time, in the order of tests/conftest.py. What the tests compile and compute keeps
# more cores busy than that.
TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py fusedloss/_build.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)

.PHONY: help demo check test cuda-build bench gpu lint format build wheel clean

help:
	@echo "make demo        train with fusedloss's losses beside torch's, show the curves and a table of times"
	@echo "make check       lint, check the types, and run the fast tests: under 90 s after a build"
	@echo "make test        run all tests"
	@echo "make cuda-build  build with nvcc, which must be installed, in $(VENV_CUDA), and run CPU tests; needs no GPU"
	@echo "make bench       measure against torch, eager and compiled"
	@echo "make gpu         on a machine with a GPU, in the Python there: build, measure, sanitize and test the kernels;"
	@echo "                 STEPS names the steps, or a group of them: first (5 min), second (4 min) or all"
	@echo "make lint        check the style of Python and C++, and the types; make format corrects the style"
	@echo "make wheel       build the wheel and the source distribution into dist/"
	@echo "make clean       remove everything that was built, .venv and $(VENV_CUDA) included"

demo: build
	$(PY) -m benchmarks.demo

check: lint build
	$(PY) -m pytest $(TWO) $(FAST_TESTS) tests/test_layers.py tests/test_stub.py

test: build
	$(PY) -m pytest $(TWO) tests

# The tests are copied away from the checkout, whose own package would be imported in place of the installed one.
cuda-build: $(VENV_CUDA)/built
	@rm -rf $(VENV_CUDA)/away && mkdir $(VENV_CUDA)/away && cp -r pyproject.toml tests $(VENV_CUDA)/away
	cd $(VENV_CUDA)/away && ../bin/python -c "import fusedloss; what = fusedloss.describe(); print(what); \
		assert 'CPU and CUDA' in what and '(prebuilt, ' in what"
	cd $(VENV_CUDA)/away && ../bin/python -m pytest $(TWO) $(FAST_TESTS)

bench: build
	$(PY) -m benchmarks

# No .venv: torch, and the toolkit that fits it, are those of the machine.
OUT ?= build/gpu
STEPS ?= first
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(OUT) $(STEPS)

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo "$(VENV)/bin/clang-format --dry-run -Werror (all C++ and CUDA files)"
	@$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy

format: $(VENV)/installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_SOURCES)

wheel: $(VENV)/torch
	rm -rf dist
	$(PY) setup.py --quiet sdist
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

build: $(VENV)/built

# What a wheel is built with: it needs none of the tools that tests and measurements do.
$(VENV)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Python 3.10 or newer is needed, PYTHON=... names one")'
	@test -x $(PY) || { echo "make: creating $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@echo "make: installing $(TORCH)"
	@$(PIP) "$(TORCH)" "setuptools>=77" ninja
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	@echo "make: installing the tools for development"
	@FUSEDLOSS_JIT=1 $(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "make: compiling the extension"
	@$(PY) setup.py build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(PY) -c "import fusedloss; print(fusedloss.describe())"
	@touch $@

$(VENV_CUDA)/installed: Makefile
	@cd fusedloss && $(PYTHON) -c 'import sys, _build; sys.exit(_build.find_toolkit() is None and "make: no nvcc is found")'
	@test -x $(VENV_CUDA)/bin/python || { $(PYTHON) -m venv $(VENV_CUDA) || { rm -rf $(VENV_CUDA); exit 1; }; }
	@echo "make: installing $(TORCH_CUDA), with its CUDA libraries"
	@$(PIP_CUDA) install "$(TORCH_CUDA)" "setuptools>=77" ninja
	@touch $@

# Builds in a folder of its own: in build/, each kind of build would make the other compile all over again.
$(VENV_CUDA)/built: $(VENV_CUDA)/installed pyproject.toml $(SOURCES) $(wildcard fusedloss/*.py)
	@echo "make: compiling the extension with nvcc"
	@rm -rf $(VENV_CUDA)/dist
	@FUSEDLOSS_CUDA=1 TORCH_CUDA_ARCH_LIST=$(CUDA_ARCHITECTURES) \
		$(VENV_CUDA)/bin/python setup.py build --build-base $(VENV_CUDA)/build \
		bdist_wheel --dist-dir $(VENV_CUDA)/dist > $(VENV_CUDA)/build.log 2>&1 || { cat $(VENV_CUDA)/build.log; exit 1; }
	@$(PIP_CUDA) uninstall --yes fusedloss
	@$(PIP_CUDA) install "$$(echo $(VENV_CUDA)/dist/*.whl)[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_CUDA) build dist *.egg-info fusedloss/_C.*.so fusedloss/_C.*.json .pytest_cache .ruff_cache .mypy_cache .hypothesis
