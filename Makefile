# Each target works from a bare clone: it first makes .venv, and remakes it only when pyproject.toml changes.
#
#   make demo      learns to pronounce English in four minutes (KERAS_BACKEND=torch make demo: on another backend)
#   make test      lint, then the whole suite once per backend
#   make bench     the tables of docs/benchmarks.md, once per backend
#   make docs      the documentation, in site/; make docs-serve shows it on http://127.0.0.1:8000 while you write
#   make lint      style and format

PYTHON ?= python3
# Installed before the rest, whose torch is of any version: on Linux the newest one brings its own CUDA packages.
# For a GPU: make TORCH=torch
TORCH ?= torch==2.13.0
# A trained model that a test compares with: of the package only the weights are read, so it comes alone.
G2P := g2p-en==2.1.0
BACKENDS ?= tensorflow jax torch
# Processes per backend, for `make test`. 0: in the process of pytest itself, as a debugger needs it.
WORKERS ?= 2
# For example: make test BACKENDS=jax PYTEST_ARGS="-x -k lstm"
PYTEST_ARGS ?=
# For example: make bench BENCHMARKS=rwkv BACKENDS=jax
BENCHMARKS ?= recurrent attention training decoding rwkv choosing
# For example: make bench BENCH_ARGS=--quick, which leaves the page of benchmarks as it is
BENCH_ARGS ?=

export KERAS_BACKEND ?= jax
export TF_CPP_MIN_LOG_LEVEL ?= 2

BIN := .venv/bin

.PHONY: demo test bench docs docs-serve lint

demo: .venv/installed
	$(BIN)/python examples/pronounce.py

test: lint
	@status=0; summary=; \
	for backend in $(BACKENDS); do \
		echo "== $$backend"; \
		if KERAS_BACKEND=$$backend $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS); then result=passed; \
		else result=FAILED; status=1; fi; \
		summary="$$summary$$backend: $$result\n"; \
	done; \
	printf "$$summary"; exit $$status

bench: .venv/installed
	@for backend in $(BACKENDS); do for script in $(BENCHMARKS); do \
		echo "== $$script, $$backend"; \
		KERAS_BACKEND=$$backend $(BIN)/python benchmarks/$$script.py \
			$(or $(BENCH_ARGS),--json benchmarks/results/$${script}_$$backend.json) || exit 1; \
	done; done
	$(if $(BENCH_ARGS),,$(BIN)/python benchmarks/page.py)

docs: .venv/installed
	$(BIN)/python docs/reference.py
	@# Not --quiet, which keeps the warnings from --strict as well.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

lint: .venv/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[tensorflow,jax,torch,examples,dev,docs]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps "$(G2P)"
	@touch $@
