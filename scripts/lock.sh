#!/usr/bin/env bash
# Renews the locks: requirements/*.txt from their .in, then those of the images, which keep to the versions of runtime.txt.
#
#   scripts/lock.sh [--upgrade]     further options go to `uv pip compile`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly uv=$PWD/.venv/bin/uv root=$PWD
options=("$@")

main() {
  local name folder
  for name in runtime dev tools docs; do
    lock requirements "$name" --universal --python-version 3.11 --excludes excludes.txt
  done
  for folder in images/*/; do
    case $folder in
      # torch of the default index, with its CUDA libraries; it has none of these for other systems
      images/base-gpu/)
        lock "$folder" requirements --python-platform linux --python-version 3.11 \
          --excludes <(grep -vx torch "$root/requirements/excludes.txt")
        ;;
      # nothing is resolved: vLLM's image has the rest
      images/generate-responses-vllm/) lock "$folder" requirements --universal --python-version 3.12 --no-deps ;;
      *) lock "$folder" requirements --universal --python-version 3.11 --excludes "$root/requirements/excludes.txt" ;;
    esac
  done
  lock images/base-cpu kfp --universal --python-version 3.11 --no-deps
}

lock() { # FOLDER NAME OPTIONS...
  local folder=${1%/} name=$2
  shift 2
  echo "$folder/$name.txt"
  (cd "$folder" && "$uv" pip compile "$name.in" --output-file "$name.txt" --quiet --generate-hashes \
    --no-emit-index-url --no-emit-find-links --annotation-style line --custom-compile-command "make lock" \
    "$@" "${options[@]}")
}

main
