# Each target makes the environment first if it is missing or out of date; nothing needs root.
#   make demo              animate the bundled catalogue on this machine
#   make test              everything: format, lint, types, all tests
#   make check             format, lint, types and the quick tests
#   make test-heavy        only the tests with Ray clusters, S3 servers and browsers
#   make docs              the site of the documents, build/site/index.html; a dead link fails
#   make test-pythons      the quick tests and the wheel's on each Python of 3.11 to 3.14 that is here or that `uv` finds
#   make soak              random faults from a printed seed, and leaks: PIA_RAY_SOAK_S seconds, 600 if left out
#   make bench             the benchmarks
#   make gpu               for a machine with an NVIDIA GPU: its cards in 12 minutes; ARGS="--parts kernels,waits" for some
#   make env               only the environment, .venv
#   make TORCH=cpu ...     on first use: the torch build without CUDA, some 3 GB less to download
#   make PYTHON=... ...    on first use: the Python to build on

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Groups of tests start in the order of tests/conftest.py, those that take longest first.
PYTEST := $(BIN)/pytest --dist loadgroup --no-loadscope-reorder
PYTHON ?=
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14)
TORCH ?=
# pip would compile 26,000 modules one by one; `compileall` does it on all cores.
PIP_INSTALL := install --quiet --disable-pip-version-check --no-compile
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# With it, each of hundreds of processes would compile the package anew, and pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
PYTHONS ?= 3.11 3.12 3.13 3.14
TESTS ?=
ARGS ?=
.PHONY: help env demo test test-all check test-quick test-heavy test-pythons soak lint docs bench gpu

help:
	@sed -n 's/^#   //p' Makefile

env: $(READY)

demo: $(READY)
	@$(BIN)/pia-ray demo --output out/demo

# One run of all tests: while one waits for Ray, others work, and no process imports the tests' modules twice.
test: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 docs lint test-all

test-all: $(READY)
	$(PYTEST) --numprocesses 4

check: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 docs lint test-quick

test-quick: $(READY)
	$(PYTEST) --numprocesses 3 -m "not heavy" $(TESTS)

test-heavy: $(READY)
	$(PYTEST) --numprocesses 3 -m heavy

# `make test-pythons PYTHONS="3.12 /path/to/python3.13" TESTS="tests/config tests/manifest"` runs a part.
test-pythons:
	@set -e; \
	for wanted in $(PYTHONS); do \
	    case $$wanted in */*) python=$$wanted;; *) python=$$(command -v python$$wanted || true);; esac; \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true); \
	    if [ -z "$$version" ] && python=$$(uv python find --no-project $$wanted 2>/dev/null); then version=$$wanted; fi; \
	    if [ -z "$$version" ]; then echo "== Python $$wanted is not here: left out"; continue; fi; \
	    echo "== Python $$version: $$python"; \
	    $(MAKE) --no-print-directory VENV=.venv-$$version PYTHON="$$python" test-quick; \
	    .venv-$$version/bin/pytest -m heavy -k wheel tests/cluster/test_manifests.py; \
	done

soak: $(READY)
	$(BIN)/pytest --capture=no -m soak

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(READY)
	@$(BIN)/python -m tests.docs.site
	@NO_COLOR=1 $(BIN)/zensical build --strict --clean

bench: $(READY)
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program"; done
	@echo "== pia-ray bench"; $(BIN)/pia-ray bench --size demo --steps 6 --batches 1,2,4 --against benchmarks/cards

gpu: $(READY)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

$(READY): pyproject.toml constraints.txt
	@set -e; \
	say() { printf '%s\n' "$$*" >&2; }; \
	if ! $(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then \
	    python=; \
	    for candidate in $(CANDIDATES); do \
	        if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
	        then python=$$candidate; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        say "pia-ray needs Python 3.11 to 3.14; none of these is one: $(CANDIDATES)."; \
	        say "Install one, or name it: make PYTHON=/path/to/python3.13 ..."; exit 1; \
	    fi; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        say "$$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"; exit 1; \
	    fi; \
	    say "Making the environment in $(VENV) with $$("$$python" -V)."; \
	    "$$python" -m venv --clear $(VENV); \
	fi; \
	say "Installing the pinned packages; the first time this downloads a lot and takes some minutes."; \
	if [ "$(TORCH)" = cpu ]; then \
	    $(BIN)/python -m pip $(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) \
	        "$$(grep '^torch==' constraints.txt)"; \
	elif ! command -v nvidia-smi >/dev/null && ! $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    say "There is no NVIDIA GPU here: \`make TORCH=cpu ...\` would download some 3 GB less."; \
	fi; \
	grep -v '^spandrel==' constraints.txt >$(VENV)/constraints.txt; \
	$(BIN)/python -m pip $(PIP_INSTALL) -r $(VENV)/constraints.txt; \
	$(BIN)/python -m pip $(PIP_INSTALL) --no-deps "$$(grep '^spandrel==' constraints.txt)"; \
	$(BIN)/python -m pip $(PIP_INSTALL) --no-deps --no-build-isolation --editable .; \
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true; \
	wrong=$$($(BIN)/python -m pip check | grep -v -e '^No broken' -e '^spandrel .* requires torchvision' || true); \
	[ -z "$$wrong" ] || { say "$$wrong"; exit 1; }; \
	touch $@; \
	say "The environment is ready."
