# The two commands of a newcomer are `make demo` and `make test`; everything else is for who works on the code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# With a driver older than 580: `make install CUDA=12`, which later calls remember.
REMEMBERED := $(shell cat $(VENV)/cuda 2>/dev/null || echo 13)
CUDA := $(REMEMBERED)
# The lock has torch's build of CUDA 13. torch 2.9.1 on PyPI is one of CUDA 12, and passes the tests too.
LOCK_12 := grep -v -e ^torch -e ^triton -e ^nvidia- -e ^cuda- requirements.lock; echo torch==2.9.1
LOCK_13 := cat requirements.lock
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
PIP := $(BIN)/python -m pip $(QUIET)
NEEDED_KB := 10000000
# Two at a time, each on one thread; a file's tests stay together, for they share what they prepare. Files in the order
# of tests/conftest.py, the longest first, so that none is alone at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: demo test test-all test-long check coverage format install install-dev lock preflight clean

demo: install
	$(BIN)/python tools/demo.py

test: install-dev
	$(PYTEST) -m "not slow and not long"

test-all: install-dev
	$(PYTEST) -m "not long"

test-long: install-dev
	$(PYTEST) -m long

coverage: install-dev
	$(PYTEST) -m "not slow and not long" --cov --cov-report=term-missing:skip-covered

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_readme.py

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# For training, conversion and evaluation.
install: $(VENV)/installed-cuda$(CUDA)

# And for tests, lint and types; the targets that need it call it.
install-dev: $(VENV)/dev-cuda$(CUDA)

$(VENV)/installed-cuda$(CUDA): pyproject.toml requirements.lock | preflight
	$(call install_into_venv,.)
	touch $@

$(VENV)/dev-cuda$(CUDA): pyproject.toml requirements.lock | preflight
	$(call install_into_venv,.[dev])
	touch $@ $(VENV)/installed-cuda$(CUDA)

# Of both CUDAs some libraries have the same files: another one takes an environment of its own.
define install_into_venv
	$(PYTHON) -m venv $(if $(filter $(REMEMBERED),$(CUDA)),,--clear) $(VENV)
	rm -f $(VENV)/*-cuda*
	{ $(LOCK_$(CUDA)); } > $(VENV)/constraints.txt
	$(PIP) install --upgrade pip
	@echo "installing into $(VENV): torch and its CUDA libraries are some gigabytes, this takes minutes"
	PYTHONWARNINGS=ignore $(PIP) install --constraint $(VENV)/constraints.txt --editable "$(1)"
	echo $(CUDA) > $(VENV)/cuda
	@$(BIN)/python -c "from pretrain.cluster import local; local.warn_of_missing_gpus()"
endef

# What apt must have installed, told in one line instead of a traceback.
preflight:
	$(if $(LOCK_$(CUDA)),,$(error CUDA is $(CUDA), expected 12 or 13))
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: apt install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: give PYTHON=python3.12, say"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: apt install python3-venv"; exit 2; }
	@test -e $(VENV)/cuda || test `df -Pk . | awk 'NR==2 {print $$4}'` -gt $(NEEDED_KB) || { echo "less than 10 GB free here: torch and its libraries need it"; exit 2; }

# Rewrites the versions that `install` uses, from what pyproject.toml allows today.
lock: preflight
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip $(QUIET) install --editable ".[dev]"
	$(VENV)-lock/bin/pip freeze --exclude-editable > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) demo
