#!/usr/bin/env bash
# Renews the locks from what pyproject.toml declares:
#   requirements/lock.txt   all that this repository and its images install, but torch
#   requirements/cuda.txt   torch as it comes by default, and its CUDA libraries: 3 GB that only machines with a GPU install
#
#   scripts/lock.sh [--upgrade]     further options go to `uv pip compile`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly uv=$PWD/.venv/bin/uv python=$PWD/.venv/bin/python
readonly lock=$PWD/requirements/lock.txt cuda=$PWD/requirements/cuda.txt
options=("$@")

main() {
  local groups locked
  readarray -t groups < <("$python" -c '
import tomllib
for group in tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]:
    print(f"--group={group}")')
  compile pyproject.toml --all-extras "${groups[@]}" --annotation-style line --output-file requirements/lock.txt
  readarray -t locked < <(sed -nE 's/^([a-z0-9.-]+)==.*/--no-emit-package=\1/p' "$lock")
  compile - --directory / --constraint "$lock" "${locked[@]}" --no-annotate --output-file "$cuda" <requirements/torch.txt
  check_vllm
}

compile() {
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --no-emit-find-links --custom-compile-command "make lock" "$@" "${options[@]}"
}

# vLLM's image keeps its own packages; those that it gets from the lock must suit them.
check_vllm() {
  local version
  version=$(sed -nE 's/^ARG VLLM_IMAGE=.*:v([0-9.]+)@.*/\1/p' images/Dockerfile)
  { echo "vllm==$version" && "$python" scripts/locked.py --alone vllm | sed -nE '/^[a-z]/s/ *\\$//p'; } |
    "$uv" pip compile --quiet --directory / --python-platform linux --python-version 3.12 - >/dev/null
}

main
