# Every target works on a fresh clone: it makes its own virtual environment (.venv) and installs pinned versions there.
#   make demo       the main job on real images: train, quantize, lower, run, compare, explain
#   make test       linters and the quick tests, branch coverage at the end
#   make test-all   the same with the slow tests
#   make lint       format, lint, types, import contracts
#   make bench      all benchmarks, beside the peers, which it installs
# Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
HASHSEED ?= 0# the test workers must agree on the order of sets, which stand in names of tests
PINS := requirements/pins.txt
# ExecuTorch's Arm quantizers import its serializer. It asks for an old numpy that it does not need here, so it comes without
# what it asks for; where it has no build, the tests of those quantizers are skipped with that reason.
TOSA := tosa-tools==2026.8.0
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=$(HASHSEED) $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term

.PHONY: demo test test-all lint bench format clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python -m demo.digits

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) \
		--no-build-isolation --editable ".[dev,bench]"
	$(BIN)/python -m benchmarks

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage*

# torch first and alone, so that pip takes the CPU build where one is offered; the pins then keep it where it is.
# --no-build-isolation builds with the pinned setuptools instead of the newest one.
$(STAMP): pyproject.toml $(PINS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) torch==2.13.0 setuptools
	$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint $(PINS) \
		--no-build-isolation --editable ".[dev]"
	-$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps $(TOSA)
	touch $@
