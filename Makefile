# Every target makes its own surroundings: Python 3.11 and make are all that a machine needs.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
MINUTES ?= 5

python := .venv/bin/python
installed := .venv/.installed
# Most tests wait for other processes.
side_by_side := -n 3 --dist loadfile

# A folder that was moved or copied has a .venv that still points to the old place: made anew.
ifneq "$(shell cat $(installed) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(installed)
endif

.PHONY: help demo test lint check bench soak dev

help:
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(installed) ## Run the example application from start to finish, on embedded servers
	@$(python) -m examples.verify_packages demo

test: $(installed) ## Run all tests
	@$(python) -m pytest $(side_by_side)

lint: $(installed)
	@.ci/quietly "format" $(python) -m ruff format --check .
	@.ci/quietly "lint" $(python) -m ruff check .
	@.ci/quietly "types" $(python) -m mypy
	@.ci/quietly "import rules" .venv/bin/lint-imports

check: lint ## Check format, lint, types and import rules, then run all tests
	@.ci/quietly "tests" $(python) -m pytest $(side_by_side)

bench: $(installed) ## Measure throughput and latency
	@$(python) -m benchmarks

soak: $(installed) ## Run flows under random failures: MINUTES=5, SEED, BROKER=embedded|redis|rabbitmq, DATABASE=sqlite|postgresql
	@$(python) -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(BROKER),--broker $(BROKER)) $(if $(DATABASE),--database $(DATABASE))

dev: $(installed) ## Run broker, worker, beat and Flower together, until Ctrl-C
	@.venv/bin/celery-flows dev

$(installed): pyproject.toml constraints.txt
	@.ci/install "$(PYTHON)"
