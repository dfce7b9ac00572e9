# Every target sets up what it needs first (scripts/setup.sh), which takes no time when nothing changed.
#
#   make run CONFIG=configs/own-data.yaml PIPELINE=process RUNNER=docker
#   make submit CONFIG=configs/llama-guard-7b.yaml PLATFORM=gpu-cluster HOST=https://kubeflow.example.org/pipeline
#   make test PYTEST_ARGS="-n 0 tests/guard"
#   make setup TORCH_INDEX=...    torch from this package index: a mirror, or one CUDA version's builds
#   make lock LOCK_ARGS=--upgrade

SHELL := bash
# Without compiled modules kept, each of a run's processes compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin

CONFIG ?= configs/demo.yaml
PIPELINE ?= full
RUNNER ?= local
PLATFORM ?=
HOST ?=
NAMESPACE ?=
EXPERIMENT ?=
CRON ?=
ARGS ?=
IMAGES ?=
PYTEST_ARGS ?=
LOCK_ARGS ?=
CASES ?= 100000
START ?= 0
ROWS ?= 10000,100000
RUN ?= latest
WORKERS ?= 1
DATA ?=
FINISHED ?=

# What users give reaches commands as environment, never as text of make or of a shell: a value may hold $(...) or quotes.
GIVEN := CONFIG PIPELINE RUNNER PLATFORM HOST NAMESPACE EXPERIMENT CRON ARGS IMAGES PYTEST_ARGS LOCK_ARGS CASES START ROWS RUN \
  WORKERS DATA FINISHED
ON_COMMAND_LINE := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(foreach name,$(GIVEN) $(ON_COMMAND_LINE),$(eval override $(name) := $$(value $(name))))
ifeq ($(PLATFORM),)
override PLATFORM := $(RUNNER)
endif
export $(GIVEN)
# pytest reads options from there, quotes included; the last one counts.
pytest = PYTEST_ADDOPTS="$(1) $$PYTEST_ARGS" $(BIN)/pytest

.DEFAULT_GOAL := help
.PHONY: help setup ready run submit schedule compile golden services images push load minikube-up \
  minikube-down ui test test-images test-faults test-security fuzz coverage bench-guard bench-train bench-generate bench-load \
  embedded-guard experiment check lint types fmt docs docs-generate screenshots hooks sbom lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: ## Set up .venv from the locks, with the build of torch that fits this machine
	@scripts/setup.sh

ready:
	@scripts/setup.sh --quiet

run: ready ## Run the pipeline (CONFIG=configs/demo.yaml PIPELINE=full PLATFORM=local)
	@$(BIN)/guardloop run --config "$$CONFIG" --pipeline "$$PIPELINE" --platform "$$PLATFORM"

# The platform `local` is no cluster; minikube is the nearest one.
submit schedule: override PLATFORM := $(if $(filter local,$(PLATFORM)),minikube,$(PLATFORM))
ON_CLUSTER := --config "$$CONFIG" --pipeline "$$PIPELINE" --platform "$$PLATFORM" $${HOST:+--host "$$HOST"} \
  $${NAMESPACE:+--namespace "$$NAMESPACE"} $${EXPERIMENT:+--experiment "$$EXPERIMENT"} $$ARGS

submit: ready ## Run the pipeline on a cluster (CONFIG= PLATFORM=minikube HOST= NAMESPACE= EXPERIMENT= ARGS=--no-wait)
	@$(BIN)/guardloop submit $(ON_CLUSTER)

schedule: ready ## Run it there again and again (CRON="0 3 * * 1", and what submit takes)
	@$(BIN)/guardloop schedule create --cron "$$CRON" $(ON_CLUSTER)

compile: ready ## Compile the pipelines to YAML for Kubeflow (PLATFORM=minikube CONFIG=configs/demo.yaml)
	@$(BIN)/guardloop compile --platform "$$PLATFORM" --config "$$CONFIG"

golden: ready ## Write the golden pipelines of tests/pipeline anew, after a change that is meant
	@UPDATE_GOLDEN=1 $(BIN)/pytest tests/launch/kubeflow/test_platform.py -k golden
	@git diff --stat tests/pipeline/golden

minikube-up: ## Start minikube with Kubeflow Pipelines, MLflow and an object store (ARGS=--dry-run prints the commands)
	@scripts/minikube.sh up $$ARGS

minikube-down: ## Delete that minikube, with everything in it
	@scripts/minikube.sh down $$ARGS

ui: ready ## Open MLflow on the runs, metrics and models
	@$(BIN)/guardloop ui

services: ready ## Start an S3 store and an MLflow server on this machine, until Ctrl-C
	@scripts/services.sh

images: ready ## Build the stages' images, named for this commit (FLAVOUR=cpu, gpu or all; IMAGES=screen)
	@scripts/images.sh build $$IMAGES

push: ready ## Push the images (REGISTRY=registry.example.com/team/guardloop)
	@scripts/images.sh push $$IMAGES

load: ready ## Load the images into minikube
	@scripts/images.sh load $$IMAGES

test: ready ## Run all tests, two at a time (PYTEST_ARGS=... for a part of them)
	@$(call pytest,-n 2 --dist worksteal)

test-images: ready ## Build the images and compare a run in containers with one in processes
	@scripts/test-images.sh

test-faults: ready ## Fault drills: kills, bad stores, full disks (FAULT_KILLS=20 of each stage); some twenty minutes
	@$(call pytest,-m faults) tests

test-security: ready ## Attacks by prompt, file, model, endpoint or address, and what holds them: a minute at most
	@$(call pytest,-m security -n 2) tests

fuzz: ready ## Feed the readers damaged files (CASES=100000 START=0)
	@$(BIN)/python -W ignore tests/fuzz --cases "$$CASES" --start "$$START"

sbom: ready ## Write build/sbom.json: what the library and its pipelines run on, as CycloneDX
	@$(BIN)/python -m scripts.sbom

coverage: ready ## Run all tests and list the lines that none of them reaches
	@$(call pytest,-n 2 --dist worksteal) --cov=guardloop --cov=components --cov=launch --cov=pipeline --cov-branch \
	  --cov-report=term-missing:skip-covered

bench-guard bench-train bench-generate bench-load: ready ## Measure scoring, training, answering or growth (ROWS=10000,100000), and write docs/benchmarks.md
	@$(BIN)/python -W ignore -m bench.$(@:bench-%=%) $(if $(filter bench-load,$@),--rows "$$ROWS")

experiment: ready ## Compare the recipe with every control (CONFIG= DATA=folder WORKERS=1; FINISHED=1: the arms that are done)
	@$(BIN)/python -W ignore -m bench.experiment.run $(if $(filter configs/experiments/%,$(CONFIG)),"$$CONFIG") \
	  $${DATA:+--data "$$DATA"} --workers "$$WORKERS" $(if $(FINISHED),--finished)

check: lint types ## Lint, types and the fast tests: what to run before a commit
	@QUICK=1 $(call pytest,-m 'not slow and not faults' -n auto --dist worksteal)

lint: ready ## Check style, formatting, import rules and unused code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/vulture

types: ready ## Check types
	@$(BIN)/mypy

embedded-guard: ready ## Train the embedded guard's adapter anew, after a change to its recipe (six minutes on two cores)
	@$(BIN)/python -W ignore -m scripts.embedded_guard

fmt: ready ## Format the code and fix what can be fixed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: docs-generate ## Build the site of the documentation into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html"

docs-generate: ready ## Write the references of settings and files from the code
	@$(BIN)/python -W ignore -m scripts.docs

screenshots: ready ## Make the pictures of docs/pictures anew from a finished run (RUN=latest); needs Chromium
	@$(BIN)/python -W ignore -m scripts.screenshots "$$RUN"

hooks: ready ## Check style, types and generated pages before each commit (pre-commit)
	@$(BIN)/pre-commit install

lock: ready ## Renew the locks from pyproject.toml (LOCK_ARGS=--upgrade for newer versions)
	@scripts/lock.sh $$LOCK_ARGS

clean: ## Remove .venv, caches and build output (runs in .guardloop stay)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
