# `make help` lists the targets; each builds the environment first if it has to.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long lint format bench docs test-vllm wheel lock clean

PY := .venv/bin/python
ARGS ?=
VLLM ?= 0.29.0
TESTS ?= tests/vllm tests/unit/vllm_plugin

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the pinned requirements (nothing to do when it is up to date)
	@scripts/setup.sh

demo: setup  ## serve the same requests with stock vLLM and with SLOs-Serve, and count the promises kept
	.venv/bin/slos-serve demo --json demo.json $(if $(findstring agents,$(ARGS)),,--png demo.png) $(ARGS)

test: setup  ## run every test but those of `make test-long` (ARGS="-m 'not engine'" leaves out those that start a real engine)
	$(PY) -m pytest $(ARGS)

test-long: setup  ## what `make test` leaves out: two engines under Ray Serve, one of them killed; drafts, refusals and tenants on a real engine; the live page in Chromium
	$(PY) -m pytest -m long $(ARGS)

lint: setup  ## ruff, mypy --strict, import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict src tests
	.venv/bin/lint-imports --no-logo

format: setup  ## rewrite the files the way `make lint` wants them, where that is safe
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup  ## run the benchmarks of benchmarks/ that need no GPU (ARGS=planner for one of them)
	$(PY) -m benchmarks $(ARGS)

docs:  ## build the documentation into site/ (scripts/docs.sh serve shows it while you write)
	@scripts/docs.sh

test-vllm:  ## run the plug-in's tests on another vLLM, in an environment of its own (VLLM=0.29.0)
	@scripts/setup.sh .venvs/vllm-$(VLLM) $(VLLM)
	.venvs/vllm-$(VLLM)/bin/python -m pytest $(TESTS) $(ARGS)

wheel:  ## build the package into dist/, check it in a fresh environment, write an SBOM
	@scripts/check_wheel.sh

lock: setup  ## resolve requirements/*.in into the pinned lists
	$(PY) scripts/environment.py lock

clean:  ## remove the environments and every cache inside the project
	rm -rf .venv .venvs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist site
