# make setup | run | up | down | test | bench-retriever | bench-judge | lint | clean     needs Python 3.11+, pip and make
SHELL  := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
WORKERS ?= 2
# libgomp's spinning makes small torch models 10 to 100 times slower on a busy machine
export OMP_WAIT_POLICY := PASSIVE
# bytecode is worth a factor of 3 in import time, whatever the surroundings say
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup run up down test test-live chaos audit bench-retriever bench-judge lint clean
help:
	@echo "make setup   build $(VENV) and fetch the model weights (once)"
	@echo "make run     run the whole chain; pass options with ARGS='--recipe smoke'"
	@echo "make up      start Prefect, MLflow and a worker; schedules run from then on"
	@echo "make down    stop exactly those"
	@echo "make test    run the tests (make test-live: with the real servers, a minute or two)"
	@echo "make chaos   kill, starve and break runs; last line: survived N of M; ARGS='--kills 5 --seed 1'"
	@echo "make audit   every installed package pinned, and none with a known vulnerability"
	@echo "make bench-retriever   time, memory and recall of the index kinds; ARGS='10000 1000000'"
	@echo "make bench-judge       the shared-prefix engine against plain forwards and TRL; ARGS='--full'"
	@echo "make lint    ruff, mypy and the import contracts"
	@echo "make clean   remove $(VENV) and caches (weights and .relearn stay)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); ok or print("got Python %d.%d; expected 3.11 or newer; do this: make PYTHON=/path/to/python3.11 setup" % sys.version_info[:2]); sys.exit(not ok)'
	@echo "setup: creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# pip repeats a notice for every search location that lacks a package: that line is left out, no other
$(VENV)/.installed: pyproject.toml infra/constraints.txt | $(BIN)/python
	@echo "setup: installing packages (two to five minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c infra/constraints.txt -e '.[dev]' \
		2> >(grep -vE "^WARNING: Location .* is ignored" >&2 || true)
	@$(BIN)/python -m compileall -q $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		>/dev/null 2>&1 || true   # a few packages carry templates that are no Python
	@touch $@

setup: $(VENV)/.installed
	@$(BIN)/python infra/fetch_weights.py
	@$(BIN)/python -m tasks.blank

run: setup
	@$(BIN)/relearn run $(ARGS)

up: setup
	@$(BIN)/relearn up $(ARGS)

down:
	@$(BIN)/relearn down $(ARGS)

test-live: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m live $(ARGS)

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

chaos: setup
	@$(BIN)/python -m tests.chaos $(ARGS)

# pip-audit has a folder of its own: its packages are none of relearn's
audit: $(VENV)/.installed
	@test -x $(VENV)/audit/bin/python || $(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install -q --disable-pip-version-check 'pip-audit>=2.9,<3' \
		2> >(grep -vE "^WARNING: Location .* is ignored" >&2 || true)
	@$(BIN)/python infra/audit.py --with $(VENV)/audit/bin/python

bench-retriever: $(VENV)/.installed
	@$(BIN)/python tests/benchmarks/bench_retriever.py $(ARGS) 2> >(grep -vE "product/s|WARN" >&2)

bench-judge: setup
	@OMP_NUM_THREADS=2 $(BIN)/python tests/benchmarks/bench_judge.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
