# Every target does its own set-up in .venv, once; needed beforehand: make, a C++ compiler, Python 3.10 or newer with its
# headers and venv. PYTHON=python3.12 chooses another Python (after `make clean`).

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py fusedloss/_build.py $(wildcard csrc/* csrc/*/*)

.PHONY: help demo test bench lint format build wheel clean

help:
	@echo "make demo    train with fusedloss's losses beside torch's, show the curves and a table of times"
	@echo "make test    run all tests"
	@echo "make bench   measure against torch, eager and compiled"
	@echo "make lint    check the style; make format puts it right"
	@echo "make wheel   build the wheel and the source distribution into dist/"
	@echo "make clean   remove everything that was built, .venv included"

demo: build
	$(PY) -m benchmarks.demo

test: build
	$(PY) -m pytest tests

bench: build
	$(PY) -m benchmarks

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

wheel: $(VENV)/installed
	rm -rf dist
	$(PY) setup.py --quiet sdist
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

build: $(VENV)/built

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Python 3.10 or newer is needed, PYTHON=... names one")'
	@test -x $(PY) || { echo "make: creating $(VENV)"; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; }
	@echo "make: installing $(TORCH) and the tools for development"
	@$(PIP) "$(TORCH)" "setuptools>=77"
	@FUSEDLOSS_JIT=1 $(PIP) --no-build-isolation --editable ".[dev]"
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "make: compiling the extension"
	@$(PY) setup.py build_ext --inplace > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@$(PY) -c "from fusedloss import _backend; print(_backend.describe())"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fusedloss/_C.* .pytest_cache .ruff_cache .hypothesis
