# Every target works on a fresh clone: it makes its own virtual environment (.venv) and installs pinned versions there.
#   make demo       the main job on real images: train, quantize, lower, run, compare, explain
#   make test       linters and the quick tests, branch coverage at the end
#   make test-all   the same with the slow tests
#   make lint       format, lint, types, import contracts
#   make docs       the documentation as a site in out/site, warnings as errors
#   make bench      all benchmarks, beside the peers
# `make demo` installs what the demo needs; the others add the linters and the peers of tests and benchmarks. All share
# .venv, and nothing is installed twice.
# Another interpreter or place: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
HASHSEED ?= 0# the test workers must agree on the order of sets, which stand in names of tests
PINS := requirements/pins.txt
# Packages of which the tests need a part that works without their dependencies. Where one cannot be installed, its tests
# are skipped and name it.
# ExecuTorch's Arm quantizers import the serializer of tosa-tools, which asks for an old numpy that it does not need here.
TOSA := tosa-tools==2026.8.0
# The classes and the reader of Model Explorer are 2 MB; the viewer that it asks for is 130 MB.
EXPLORER := ai-edge-model-explorer==0.1.34
# axe-core, the script that looks for barriers in the report's page; the package wants a browser of its own.
AXE := axe-playwright-python==0.1.8
BIN := $(VENV)/bin
FOR_DEMO := $(VENV)/.installed-for-demo
FOR_TESTS := $(VENV)/.installed-for-tests
FOR_DOCS := $(VENV)/.installed-for-docs
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint $(PINS)
# loadfile: the tests of a file share programs that take long to make, so one worker runs them all.
PYTEST := OMP_NUM_THREADS=1 PYTHONHASHSEED=$(HASHSEED) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
    --cov --cov-report=term

.PHONY: demo test test-all lint docs bench format clean
.DELETE_ON_ERROR:

demo: $(FOR_DEMO)
	@$(BIN)/python -m demo.digits

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m ""

lint: $(FOR_TESTS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(FOR_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(FOR_TESTS)
	$(BIN)/python -m benchmarks

format: $(FOR_TESTS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage*

# torch first and alone, so that pip takes the CPU build where one is offered; the pins then keep it where it is.
# --no-build-isolation builds with the pinned setuptools instead of the newest one.
$(FOR_DEMO): Makefile pyproject.toml $(PINS)
	@echo "Installing torch and ExecuTorch in $(VENV): a few minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) torch==2.13.0 setuptools
	@$(INSTALL) --no-build-isolation --editable ".[demo]"
	@touch $@

$(FOR_TESTS): $(FOR_DEMO)
	@echo "Installing the linters, and the packages that the tests compare with, in $(VENV): a few minutes the first time"
	@$(INSTALL) --no-build-isolation --editable ".[dev]"
	-@$(INSTALL) --no-deps $(TOSA)
	-@$(INSTALL) --no-deps $(EXPLORER)
	-@$(INSTALL) --no-deps $(AXE)
	@touch $@

$(FOR_DOCS): $(FOR_DEMO)
	@echo "Installing what builds the site in $(VENV)"
	@$(INSTALL) --no-build-isolation --editable ".[docs]"
	@touch $@
