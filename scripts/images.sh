#!/usr/bin/env bash
# Builds the stages' images, pushes them, or loads them into minikube. The tag is the commit that is checked out.
#
#   scripts/images.sh build [STAGE...]    all, or those named
#   scripts/images.sh push [STAGE...]     to REGISTRY=registry.example.com/team/guardloop
#   scripts/images.sh load [STAGE...]     into minikube (MINIKUBE_PROFILE=guardloop)
#   scripts/images.sh list                the stages' names
#   scripts/images.sh bases               where no registry can be reached: Debian from debootstrap (as root) and the uv of
#                                         .venv as base images; prints what to give to `build`
#
#   FLAVOUR=cpu|gpu|all     which of them (build, push: all; load: cpu); gpu images have `-gpu` behind their tag
#   TAG=...                 instead of the commit
#   PYTHON_IMAGE=, UV_IMAGE=, VLLM_IMAGE=    other public images than those of images/Dockerfile
#   CA_BUNDLE=, UV_CONFIG=  certificates and a uv.toml (mirror, credentials) for the build alone; no image keeps them.
#                           By default SSL_CERT_FILE, and the index of pip or uv where one is set
#   TORCH_INDEX=            the index of torch's CPU build, as for `make setup`
#   HTTPS_PROXY=, ...       proxies, for the build alone
#   DOCKER=docker           the client; BUILD_ARGS="..." further options of its `build`
#   DEBIAN_MIRROR=          for debootstrap, instead of its own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly name=guardloop debian=guardloop-base/debian-python:3.11 own_uv=guardloop-base/uv:venv
readonly python=${PYTHON:-.venv/bin/python}
readonly wheels=build/images/wheels # what images/Dockerfile takes torch from, if a wheel is there
docker=${DOCKER:-docker}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

main() {
  local action=${1:-}
  shift || true
  case $action in
    list) stages cpu ;;
    build)
      find_builder
      tag=$(find_tag)
      find_options
      for_each_image all build_one "$@"
      ;;
    push)
      : "${REGISTRY:?say where to: make push REGISTRY=registry.example.com/team/guardloop}"
      tag=$(find_tag)
      if [[ $tag == *-dirty-* ]]; then
        echo "There are uncommitted changes, so no commit would name these images. Commit, then make images push." >&2
        exit 2
      fi
      for_each_image all push_one "$@"
      ;;
    load)
      tag=$(find_tag)
      for_each_image cpu load_one "$@"
      ;;
    bases) make_bases ;;
    *)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
}

# The stages that the bake file names for a flavour.
stages() {
  sed -nE "/^target \"$1\"/,/^}/s/.*stage = \[(.*)\].*/\1/p" images/docker-bake.hcl | grep -oE '[a-z-]+'
}

# for_each_image DEFAULT-FLAVOUR COMMAND [STAGE...]: COMMAND FLAVOUR STAGE NAME, for the stages named, or all.
for_each_image() {
  local flavours=${FLAVOUR:-$1} command=$2 flavour stage
  shift 2
  case $flavours in
    cpu | gpu) ;;
    all) flavours="cpu gpu" ;;
    *)
      echo "FLAVOUR is cpu, gpu or all, not $flavours." >&2
      exit 2
      ;;
  esac
  for stage in "$@"; do
    if ! stages cpu | grep -qx -- "$stage"; then
      echo "No stage is called $stage. Stages: $(stages cpu | xargs)" >&2
      exit 2
    fi
  done
  for flavour in $flavours; do
    for stage in $(stages "$flavour"); do
      if (($# == 0)) || [[ " $* " == *" $stage "* ]]; then
        "$command" "$flavour" "$stage" "$name/$stage:$tag$([[ $flavour == cpu ]] || echo -gpu)"
      fi
    done
  done
}

build_one() { # FLAVOUR STAGE NAME
  local began=$SECONDS
  if ! "$docker" build --quiet --file images/Dockerfile --target "$2" --build-arg "FLAVOUR=$1" --tag "$3" \
    --label "org.opencontainers.image.title=$name/$2" "${options[@]}" . >/dev/null 2>"$work/errors"; then
    cat "$work/errors" >&2
    explain_failure >&2
    exit 1
  fi
  printf '  %-70s %6s  %4d s\n' "$3" "$("$docker" image inspect --format '{{.Size}}' "$3" | numfmt --to=si)" \
    $((SECONDS - began))
}

explain_failure() {
  if grep -qE '^ > \[internal\] load metadata|failed to (resolve source|do request)|pull access denied|manifest unknown' "$work/errors"; then
    cat <<TEXT

A public image could not be had. Name copies that can be reached: PYTHON_IMAGE=, UV_IMAGE= (for a GPU VLLM_IMAGE=, too).
Without any registry, 'scripts/images.sh bases' makes the first two here (Debian by debootstrap, as root).
TEXT
  elif grep -qE 'failed to fetch|dns error|certificate' -i "$work/errors"; then
    cat <<TEXT

A package could not be had. Mirror: UV_CONFIG=uv.toml, or pip's index-url; torch: TORCH_INDEX=; certificates: CA_BUNDLE=;
proxy: HTTPS_PROXY=; a proxy or index on this machine: BUILD_ARGS="--network host".
TEXT
  fi
}

push_one() { # FLAVOUR STAGE NAME
  local remote=$REGISTRY/${3#"$name"/}
  "$docker" tag "$3" "$remote"
  "$docker" push --quiet "$remote"
}

load_one() { # FLAVOUR STAGE NAME
  minikube --profile "${MINIKUBE_PROFILE:-guardloop}" image load "$3"
  echo "  $3"
}

# What is the same for all images: labels, other bases, and what only the build may know.
find_options() {
  local key source ca_bundle=${CA_BUNDLE:-${SSL_CERT_FILE:-}} uv_config=${UV_CONFIG:-} index
  options=(
    --label "org.opencontainers.image.version=$(sed -nE 's/^version = "(.*)"/\1/p' pyproject.toml)"
    --label "org.opencontainers.image.revision=$(git rev-parse HEAD 2>/dev/null || true)"
    --label "org.opencontainers.image.licenses=Apache-2.0"
  )
  source=$(git remote get-url origin 2>/dev/null | sed 's#//[^/@]*@#//#' || true)
  [[ -z $source ]] || options+=(--label "org.opencontainers.image.source=$source")
  for key in PYTHON_IMAGE UV_IMAGE VLLM_IMAGE; do
    [[ -z ${!key:-} ]] || options+=(--build-arg "$key=${!key}")
  done
  for key in HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy; do
    [[ -z ${!key:-} ]] || options+=(--build-arg "$key") # the client takes the value from the environment
  done
  [[ -z $ca_bundle ]] || options+=(--secret "id=ca,src=$ca_bundle")
  index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}}}
  if [[ -z $uv_config && -n $index ]]; then
    uv_config=$work/uv.toml
    write_index "$index" "$uv_config"
  fi
  [[ -z $uv_config ]] || options+=(--secret "id=uv,src=$uv_config")
  find_torch
  # shellcheck disable=SC2206  # several options in one variable
  options+=(${BUILD_ARGS:-})
}

# torch's CPU build: from TORCH_INDEX, else from pip's local folder if it has this version, else from where uv knows.
find_torch() {
  rm -rf $wheels # a wheel of an earlier build decides nothing
  if [[ -n ${TORCH_INDEX:-} ]]; then
    write_index "$TORCH_INDEX" "$work/torch.toml"
    options+=(--secret "id=torch,src=$work/torch.toml" --build-arg "TORCH_FROM=--config-file /etc/uv/torch.toml")
  elif "$python" -m pip download --quiet --no-deps --no-index --dest $wheels -r requirements/torch.txt >/dev/null 2>&1; then
    options+=(--build-arg "TORCH_FROM=--no-index --find-links /torch")
  fi
}

write_index() { # URL FILE
  printf '[[index]]\nurl = "%s"\ndefault = true\n' "$1" >"$2"
}

find_tag() {
  [[ -n ${TAG:-} ]] && echo "$TAG" && return
  "$python" -m launch.images
}

# RUN --mount needs BuildKit: a plugin of newer clients, and a switch of older ones.
find_builder() {
  local candidate
  if ! "$docker" info >/dev/null 2>&1; then
    echo "No Docker engine answers. Start it, or name a client with DOCKER=." >&2
    exit 2
  fi
  for candidate in "$docker" /usr/bin/docker; do
    if "$candidate" buildx version >/dev/null 2>&1; then
      docker=$candidate
      return
    elif [[ $("$candidate" version --format '{{.Client.Version}}' 2>/dev/null) =~ ^(19|20)\. ]]; then
      docker=$candidate
      export DOCKER_BUILDKIT=1
      return
    fi
  done
  echo "'$docker build' needs its plugin buildx (package docker-buildx)." >&2
  exit 2
}

make_bases() {
  if ! "$docker" image inspect $debian >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=python3.11,ca-certificates bookworm "$work/root" \
      ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$work/debootstrap.log" 2>&1 ||
      { tail -n 5 "$work/debootstrap.log" >&2 && exit 1; }
    tar -C "$work/root" --exclude=./var/cache/apt --exclude=./var/lib/apt/lists --exclude=./proc --exclude=./sys -c . |
      "$docker" import - $debian >/dev/null
  fi
  tar -C "$(dirname "$python")" -c uv | "$docker" import - $own_uv >/dev/null
  echo "PYTHON_IMAGE=$debian UV_IMAGE=$own_uv"
}

main "$@"
