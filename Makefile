# A fresh machine needs Python 3.10 to 3.13, pip and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow test-runtimes check build clean

demo: $(READY)
	$(BIN)/python examples/demo/demo.py

# Tests run in several processes; more than four only take memory.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

# A file is one process's own: its tests share what they convert.
test: $(READY)
	$(PYTEST) --dist loadfile -m "not slow and not slow_runtime"

test-slow: $(READY)
	$(PYTEST) -m slow

# Each runtime gets an environment of its own in ~/.cache/rilq-benchmarks, or $$RILQ_ENVS.
test-runtimes: $(READY)
	$(BIN)/python -m pytest -m slow_runtime

# mypy does not see through an editable install, so it is given a plain copy of the package.
check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf build
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/plain .
	MYPYPATH=build/plain $(BIN)/mypy

# Without `rm`, setuptools would pack modules deleted since the last build.
build: $(READY)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python .ci/check_wheel.py dist/*.whl

clean:
	rm -rf $(VENV) build dist demo-out rilq.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--constraint constraints.txt --editable '.[dev]'
	touch $@
