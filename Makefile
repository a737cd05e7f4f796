# The two commands of a newcomer are `make demo` and `make test`; everything else is for who works on the code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two at a time, each on one thread; a file's tests stay together, for they share what they prepare. Files in the order
# of tests/conftest.py, the longest first, so that none is alone at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: demo test test-all test-long check coverage format install lock preflight clean

demo: install
	$(BIN)/python tools/demo.py

test: install
	$(PYTEST) -m "not slow and not long"

test-all: install
	$(PYTEST) -m "not long"

test-long: install
	$(PYTEST) -m long

coverage: install
	$(PYTEST) -m "not slow and not long" --cov --cov-report=term-missing:skip-covered

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_readme.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements.lock | preflight
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing into $(VENV): torch and its CUDA libraries are some gigabytes, this takes minutes"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[dev]"
	touch $@

# What apt must have installed, told in one line instead of a traceback.
preflight:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: apt install python3 python3-venv"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: give PYTHON=python3.12, say"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make environments: apt install python3-venv"; exit 2; }
	@test `df -Pk . | awk 'NR==2 {print $$4}'` -gt 10000000 || { echo "less than 10 GB free here: torch and its libraries need it"; exit 2; }

# Rewrites the versions that `install` uses, from what pyproject.toml allows today.
lock: preflight
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --editable ".[dev]"
	$(VENV)-lock/bin/pip freeze --exclude-editable > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) demo
