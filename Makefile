# Every target sets up what it needs first (scripts/setup.sh), which takes no time when nothing changed.
#
#   make run CONFIG=configs/llama-guard-7b.yaml PLATFORM=cluster
#   make test PYTEST_ARGS="-n 2 tests/unit"
#   make setup TORCH_INDEX=...    torch from this package index: a mirror, or one CUDA version's builds
#   make lock LOCK_ARGS=--upgrade

SHELL := bash
BIN := .venv/bin

CONFIG ?= configs/demo.yaml
PIPELINE ?= full
RUNNER ?= local
PLATFORM ?= $(RUNNER)
PYTEST_ARGS ?=
LOCK_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup ready run compile ui services images push load test test-images coverage check lint types fmt lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## Set up .venv from the locks, with the build of torch that fits this machine
	@scripts/setup.sh

ready:
	@scripts/setup.sh --quiet

run: ready ## Run the pipeline (CONFIG=configs/demo.yaml PIPELINE=full PLATFORM=local)
	@$(BIN)/guardloop run --config $(CONFIG) --pipeline $(PIPELINE) --platform $(PLATFORM)

compile: ready ## Compile the pipelines to YAML for Kubeflow
	@$(BIN)/guardloop compile

ui: ready ## Open MLflow on the runs, metrics and models
	@$(BIN)/guardloop ui

services: ready ## Start an S3 store and an MLflow server on this machine, until Ctrl-C
	@scripts/services.sh

images: ready ## Build the stages' images, named for this commit (FLAVOUR=cpu, gpu or all)
	@scripts/images.sh build $(IMAGES)

push: ready ## Push the images (REGISTRY=registry.example.com/team/guardloop)
	@scripts/images.sh push $(IMAGES)

load: ready ## Load the images into minikube
	@scripts/images.sh load $(IMAGES)

test: ready ## Run all tests (PYTEST_ARGS=... for a part of them)
	@$(BIN)/pytest $(PYTEST_ARGS)

test-images: ready ## Build the images and compare a run in containers with one in processes
	@scripts/test-images.sh

coverage: ready ## Run all tests and list the lines that none of them reaches
	@$(BIN)/pytest --cov=guardloop --cov=components --cov=launch --cov=pipeline \
	  --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

check: lint types ## Lint, types and the fast tests: what to run before a commit
	@$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

lint: ready ## Check style, formatting, import rules and unused code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/vulture

types: ready ## Check types
	@$(BIN)/mypy

fmt: ready ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: ready ## Renew the locks from requirements/*.in (LOCK_ARGS=--upgrade for newer versions)
	@scripts/lock.sh $(LOCK_ARGS)

clean: ## Remove .venv, caches and build output (runs in .guardloop stay)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
