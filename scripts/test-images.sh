#!/usr/bin/env bash
# Builds the CPU images and runs the whole pipeline in them, against the same run in processes (tests/images).
# Where the public base images cannot be pulled, those of `scripts/images.sh bases` stand in for them.
#
#   scripts/test-images.sh [engine]     engine: only see whether a Docker engine is there or starts
#
#   DOCKER=docker   the client
#   KEEP=1          leave the images there; without it their layers stay in the build cache alone
#   PYTEST_ARGS=    more for pytest; all that scripts/images.sh takes holds here, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=${PYTHON:-.venv/bin/python}
export DOCKER=${DOCKER:-docker}
TAG=$("$python" -m launch.images)-test
export TAG
work=$(mktemp -d)
engine=

main() {
  trap finish EXIT
  start_engine
  [[ ${1:-} != engine ]] || return 0
  choose_bases
  local began=$SECONDS
  # The host's network: a bridge may not reach the package index from inside a build.
  BUILD_ARGS="--network host ${BUILD_ARGS:-}" FLAVOUR=cpu scripts/images.sh build
  echo "Built in $((SECONDS - began)) s."
  GUARDLOOP_TEST_IMAGES=$TAG PYTEST_ADDOPTS=${PYTEST_ARGS:-} "$python" -m pytest tests/images
}

# Docker's own, if it runs; else one for this test, which ends with it.
start_engine() {
  "$DOCKER" info >/dev/null 2>&1 && return
  if ((EUID != 0)) || ! command -v dockerd >/dev/null; then
    echo "No Docker engine answers. Start it (Debian, Ubuntu: apt install docker.io)." >&2
    exit 2
  fi
  dockerd >"$work/dockerd.log" 2>&1 &
  engine=$!
  local tries
  for ((tries = 0; tries < 150; tries++)); do
    "$DOCKER" info >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail -n 5 "$work/dockerd.log" >&2
  exit 1
}

choose_bases() {
  [[ -z ${PYTHON_IMAGE:-} ]] || return 0
  local public bases
  public=$(sed -n 's/^ARG PYTHON_IMAGE=//p' images/Dockerfile)
  "$DOCKER" image inspect "$public" >/dev/null 2>&1 && return
  timeout 60 "$DOCKER" pull --quiet "$public" 2>/dev/null && return
  echo "Cannot pull ${public%@*}: testing on Debian from debootstrap."
  bases=$(scripts/images.sh bases)
  # shellcheck disable=SC2086,SC2163  # NAME=value pairs
  export ${bases?}
}

# shellcheck disable=SC2317,SC2329  # the trap calls it
finish() {
  local status=$?
  if [[ -z ${KEEP:-} ]]; then
    "$DOCKER" images --quiet --filter "reference=guardloop/*:$TAG" | sort -u |
      xargs -r "$DOCKER" rmi --force >/dev/null 2>&1 || true
  fi
  if [[ -n $engine ]]; then
    kill "$engine" 2>/dev/null || true
    wait "$engine" || true
  fi
  rm -rf "$work"
  exit "$status"
}

main "$@"
