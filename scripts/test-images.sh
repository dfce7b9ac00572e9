#!/usr/bin/env bash
# Builds the CPU images and runs the whole pipeline in them, against the same run in processes (tests/images).
# Where the public base images cannot be pulled, Debian from debootstrap stands in for them (as root).
#
#   scripts/test-images.sh [engine]     engine: only see whether a Docker engine is there or starts
#
#   KEEP=1          leave the images there; without it their layers stay in the build cache alone
#   DEBIAN_MIRROR=  for debootstrap, instead of its own
#   PYTEST_ARGS=    more for pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly python=${PYTHON:-.venv/bin/python}
readonly debian=guardloop-test/debian-python:3.11 uv=guardloop-test/uv:venv
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
  # shellcheck disable=SC2086  # several options in one variable
  GUARDLOOP_TEST_IMAGES=$TAG "$python" -m pytest tests/images ${PYTEST_ARGS:-}
}

# Docker's own, if it runs; else one for this test, which ends with it.
start_engine() {
  docker info >/dev/null 2>&1 && return
  if ((EUID != 0)) || ! command -v dockerd >/dev/null; then
    echo "No Docker engine answers. Start it (Debian, Ubuntu: apt install docker.io)." >&2
    exit 2
  fi
  dockerd >"$work/dockerd.log" 2>&1 &
  engine=$!
  local tries
  for ((tries = 0; tries < 150; tries++)); do
    docker info >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail -n 5 "$work/dockerd.log" >&2
  exit 1
}

choose_bases() {
  [[ -z ${PYTHON_IMAGE:-} ]] || return 0
  local public
  public=$(sed -n 's/^PYTHON_IMAGE=//p' images/public.env)
  docker image inspect "$public" >/dev/null 2>&1 && return
  timeout 60 docker pull --quiet "$public" 2>/dev/null && return
  echo "Cannot pull ${public%@*}: testing on Debian from debootstrap."
  if ! docker image inspect $debian >/dev/null 2>&1; then
    local began=$SECONDS
    debootstrap --variant=minbase --include=python3.11,ca-certificates bookworm "$work/root" \
      ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 ||
      { tail -n 5 "$work/debootstrap.log" >&2 && exit 1; }
    tar -C "$work/root" --exclude=./var/cache/apt --exclude=./var/lib/apt/lists --exclude=./proc --exclude=./sys -c . |
      docker import - $debian >/dev/null
    echo "  $debian in $((SECONDS - began)) s"
  fi
  tar -C "$(dirname "$python")" -c uv | docker import - $uv >/dev/null
  export PYTHON_IMAGE=$debian UV_IMAGE=$uv
}

# shellcheck disable=SC2317,SC2329  # the trap calls it
finish() {
  local status=$?
  if [[ -z ${KEEP:-} ]]; then
    docker images --quiet --filter "reference=guardloop/*:$TAG" | sort -u | xargs -r docker rmi --force >/dev/null 2>&1 ||
      true
  fi
  if [[ -n $engine ]]; then
    kill "$engine" 2>/dev/null || true
    wait "$engine" || true
  fi
  rm -rf "$work"
  exit "$status"
}

main "$@"
