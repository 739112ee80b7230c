# Every target sets the environment up first if it is not there: .venv with the versions in constraints.txt.
# Another Python: `make test PYTHON=python3.12`. Another environment: `make test VENV=/path/to/venv`.
# An older transformers: `make test TRANSFORMERS=5.5`, in .venv-transformers-5.5; constraints-transformers-5.5.txt says
# what is installed in place of the same lines of constraints.txt.
PYTHON ?= python3
TRANSFORMERS ?=
OLDER := $(TRANSFORMERS:%=-transformers-%)
VENV ?= .venv$(OLDER)
CONSTRAINTS := $(OLDER:%=constraints%.txt) constraints.txt
PYTEST_ARGS ?=
# Processes that run the tests, of one thread each: `make test JOBS=8`.
JOBS ?= 2

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.headkv-mm-ready
SETUP_LOG := build/setup.log
TYPES := build/types/headkv_mm

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types format clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv and install the package into it

$(READY): pyproject.toml setup.py $(CONSTRAINTS)
	@mkdir -p build
	@if [ ! -x "$(BIN)/python" ]; then \
		echo "Creating $(VENV) ..."; \
		$(PYTHON) -m venv "$(VENV)" > $(SETUP_LOG) 2>&1 || { cat $(SETUP_LOG); exit 1; }; \
	fi
	@awk -F== '!seen[$$1]++' $(CONSTRAINTS) > build/constraints.txt
	@echo "Installing headkv-mm and its dependencies into $(VENV) (log: $(SETUP_LOG)) ..."
	@"$(BIN)/python" -m pip install --disable-pip-version-check --no-input -c build/constraints.txt -e ".[dev]" \
		> $(SETUP_LOG) 2>&1 || { tail -n 40 $(SETUP_LOG); exit 1; }
	@touch $@

demo: $(READY) ## draw a scene and ask a document, with the full cache and compressed, and draw the maps
	@"$(BIN)/headkv-mm" generate "a red circle top left and a blue square bottom right" \
		--compare --maps --output output/demo
	@"$(BIN)/headkv-mm" ask --compare --maps --output output/demo-document

test: $(READY) ## run the tests; nothing is downloaded (TRANSFORMERS=5.5 or 5.17: with that version)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$(BIN)/pytest" --numprocesses $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(READY) ## ruff: rules and format
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .

# mypy wants one tree, but kernels/ and pipelines/ lie beside headkv_mm/: lay the three out with links.
types: $(READY) ## mypy --strict over the three packages
	@mkdir -p $(TYPES)
	@ln -sfn $(abspath $(wildcard headkv_mm/*.py headkv_mm/py.typed headkv_mm/*/ kernels pipelines)) $(TYPES)/
	@find $(TYPES) -xtype l -delete
	@cd build/types && "$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" --cache-dir .mypy_cache -p headkv_mm

format: $(READY) ## ruff: fix what it can and format
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

clean: ## remove what the other targets made, environments excepted
	@rm -rf build output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find headkv_mm kernels pipelines tests scripts benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true
