# What a person does here. `make help` lists it.
PYTHON ?= $(firstword $(shell command -v python3.11 || command -v python3))
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo encoder test lint types unit coverage proofs clean

help: ## list these commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "CPython 3.11 is needed, '$(PYTHON)' is not it. Fix: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 3; }
	$(PYTHON) -m venv $(VENV)

# vbench and pyiqa pin numpy<2 and transformers 4.33 and list two dozen packages that none of their networks needs, so
# they are installed without their dependencies; what they do import is the extra `score`.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): about 6 GB, a few minutes"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[run,score,chat]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps vbench pyiqa
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[run,score,chat,test]'
	@touch $@

install: $(VENV)/.run ## make the environment in .venv

demo: $(VENV)/.run ## four methods ride twice around a tiny world: local Ray, CPU, local storage; minutes
	$(BIN)/lrag-ray run configs/tiny_world/demo.yaml

encoder: $(VENV)/.run ## a tiny corpus, an encoder on two workers (one is killed), measures, a rag run with it: minutes
	$(BIN)/python scripts/encoder_tiny.py

# mypy keeps one core busy for a minute or two; the tests begin beside it.
test: lint ## lint, types and tests, as CI runs them
	$(MAKE) --jobs=2 types unit

lint: $(VENV)/.test ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test ## mypy, strict
	$(BIN)/mypy

# Ray gives its processes fixed times to start, which a busy machine may exceed: a test on a real cluster that fails is
# run once more, alone, and both outcomes are printed. No other test has a second try. The files begin in the order of
# tests/conftest.py, the longest first, so that neither worker waits long for the other.
PYTEST := $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

unit: $(VENV)/.test ## pytest, a file at a time on each of two workers; then the tests on real Ray clusters
	$(PYTEST) -m 'not cluster and not proof'
	$(PYTEST) -m 'cluster and not proof' tests/cluster \
	  || $(BIN)/pytest --last-failed --last-failed-no-failures none -m 'cluster and not proof' tests/cluster

# Of the tests that are about the measured packages; counting makes them a third slower, so CI does without.
coverage: $(VENV)/.test ## pytest with the lines of the science and the store counted: 95 % have to run
	$(PYTEST) -m 'not cluster and not proof' --cov --cov-report=term-missing:skip-covered \
	  $(addprefix tests/,cli context pipelines retrieval rollout scoring stages store training video wan)

proofs: $(VENV)/.test ## pytest: runs that survive kills, partitions and scaling (an hour)
	$(BIN)/pytest -m proof

clean: ## remove the environment and caches (never runs/)
	rm -rf $(VENV) .coverage .pytest_cache .mypy_cache .ruff_cache *.egg-info
