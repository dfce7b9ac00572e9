#!/usr/bin/env bash
# Builds the stages' images, pushes them, or loads them into minikube. The tag is the commit that is checked out.
#
#   scripts/images.sh build [IMAGE...]    all, or those named (with what they stand on)
#   scripts/images.sh push [IMAGE...]     to REGISTRY=registry.example.com/team/guardloop
#   scripts/images.sh load [IMAGE...]     into minikube (MINIKUBE_PROFILE=guardloop)
#   scripts/images.sh list                the images' names
#
#   FLAVOUR=cpu|gpu|all     which of them (build, push: all; load: cpu); gpu images have `-gpu` behind their tag
#   TAG=...                 instead of the commit
#   CA_BUNDLE=, UV_CONFIG=  certificates and a uv.toml (mirror, credentials) for the build alone; no image keeps them.
#                           By default SSL_CERT_FILE and pip's index, where they are set
#   BUILD_ARGS="..."        further options of `docker build`
#   PYTHON_IMAGE=, UV_IMAGE=, VLLM_IMAGE=    other public images than those of images/public.env
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly name=guardloop
readonly python=${PYTHON:-.venv/bin/python}
readonly inputs=build/images
docker=${DOCKER:-docker}
ca_bundle=${CA_BUNDLE:-${SSL_CERT_FILE:-}}
uv_config=${UV_CONFIG:-}

# image = folder in images/, and what it stands on
readonly cpu_images=(
  base-cpu=
  base-torch=base-cpu
  prepare-data=base-cpu
  mine-feedback=base-cpu
  evaluate=base-cpu
  register-model=base-cpu
  screen=base-torch
  generate-responses=base-torch
  train-guard=base-torch
)
readonly gpu_images=(
  base-cpu=
  base-gpu=base-cpu
  screen=base-gpu
  train-guard=base-gpu
  generate-responses=
)

main() {
  local action=${1:-}
  shift || true
  case $action in
    list) printf '%s\n' "${cpu_images[@]%%=*}" "${gpu_images[@]%%=*}" | sort -u ;;
    build) build_all "$@" ;;
    push) push_all "$@" ;;
    load) load_all "$@" ;;
    *)
      sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
      exit 2
      ;;
  esac
}

build_all() {
  find_builder
  read_public_images
  tag=$(find_tag)
  make_inputs
  local flavour
  for flavour in $(flavours all); do
    for_each_image "$flavour" build_one "$@"
  done
}

push_all() {
  : "${REGISTRY:?say where to: make push REGISTRY=registry.example.com/team/guardloop}"
  tag=$(find_tag)
  if [[ $tag == *-dirty-* ]]; then
    echo "There are uncommitted changes, so no commit would name these images. Commit, then make images push." >&2
    exit 2
  fi
  local flavour
  for flavour in $(flavours all); do
    for_each_image "$flavour" push_one "$@"
  done
}

load_all() {
  tag=$(find_tag)
  local flavour
  for flavour in $(flavours cpu); do
    for_each_image "$flavour" load_one "$@"
  done
}

flavours() {
  case ${FLAVOUR:-$1} in
    cpu | gpu) echo "${FLAVOUR:-$1}" ;;
    all) echo cpu gpu ;;
    *)
      echo "FLAVOUR is cpu, gpu or all, not ${FLAVOUR}." >&2
      exit 2
      ;;
  esac
}

# for_each_image FLAVOUR COMMAND [IMAGE...]: COMMAND FLAVOUR IMAGE BASE, for the images named and their bases.
for_each_image() {
  local flavour=$1 command=$2 entry
  shift 2
  local -n table=${flavour}_images
  local wanted=" $* "
  for entry in "${table[@]}"; do
    [[ $wanted == *" ${entry%%=*} "* ]] && wanted+="${entry#*=} "
  done
  [[ $wanted != *" base-torch "* && $wanted != *" base-gpu "* ]] || wanted+="base-cpu "
  for entry in "${table[@]}"; do
    if (($# == 0)) || [[ $wanted == *" ${entry%%=*} "* ]]; then
      "$command" "$flavour" "${entry%%=*}" "${entry#*=}"
    fi
  done
}

reference() { # FLAVOUR IMAGE
  local suffix=
  [[ $1 == gpu && $2 != base-* ]] && suffix=-gpu
  echo "$name/$2:$tag$suffix"
}

build_one() {
  local flavour=$1 image=$2 base=$3 folder=$2 began=$SECONDS options=()
  [[ $flavour/$image != gpu/generate-responses ]] || folder=generate-responses-vllm
  [[ -z $base ]] || options+=(--build-arg "BASE=$(reference "$flavour" "$base")")
  [[ $image != base-torch ]] || options+=(--build-arg "TORCH_FROM=$torch_from")
  [[ -z $ca_bundle ]] || options+=(--secret "id=ca,src=$ca_bundle")
  [[ -z $uv_config ]] || options+=(--secret "id=uv,src=$uv_config")
  [[ -z $source ]] || options+=(--label "org.opencontainers.image.source=$source")
  # shellcheck disable=SC2206  # several options in one variable
  options+=(${BUILD_ARGS:-})
  "$docker" build --quiet --file "images/$folder/Dockerfile" --tag "$(reference "$flavour" "$image")" \
    --build-arg PYTHON_IMAGE="$PYTHON_IMAGE" --build-arg UV_IMAGE="$UV_IMAGE" --build-arg VLLM_IMAGE="$VLLM_IMAGE" \
    --label org.opencontainers.image.title="$name/$image" \
    --label org.opencontainers.image.version="$version" \
    --label org.opencontainers.image.revision="$(git rev-parse HEAD 2>/dev/null || true)" \
    --label org.opencontainers.image.licenses=Apache-2.0 \
    "${options[@]}" . >/dev/null
  printf '  %-70s %6s  %4d s\n' "$(reference "$flavour" "$image")" \
    "$("$docker" image inspect --format '{{.Size}}' "$(reference "$flavour" "$image")" | numfmt --to=si)" \
    $((SECONDS - began))
}

push_one() {
  local local_name remote
  [[ $2 != base-* ]] || return 0 # their layers go with the stages
  local_name=$(reference "$1" "$2")
  remote=$REGISTRY/${local_name#"$name"/}
  "$docker" tag "$local_name" "$remote"
  "$docker" push --quiet "$remote"
}

load_one() {
  [[ $2 != base-* ]] || return 0
  minikube --profile "${MINIKUBE_PROFILE:-guardloop}" image load "$(reference "$1" "$2")"
  echo "  $(reference "$1" "$2")"
}

# The wheel of guardloop, built once, and torch's, if pip has one in a local folder.
make_inputs() {
  mkdir -p $inputs/wheels
  rm -rf $inputs/dist build/lib build/bdist.* # setuptools would put files of an older build into the wheel
  # The commit's time in the wheel makes it the same again, so that unchanged layers stay.
  SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || echo 315532800) \
    "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $inputs/dist .
  version=$(basename $inputs/dist/guardloop-*.whl | cut -d- -f2)
  source=$(git remote get-url origin 2>/dev/null | sed 's#//[^/@]*@#//#' || true)
  "$python" -m pip download --quiet --no-deps --no-index --dest $inputs/wheels -r requirements/torch.txt \
    >/dev/null 2>&1 || true
  torch_from=--torch-backend=cpu
  if compgen -G "$inputs/wheels/torch-*.whl" >/dev/null; then
    torch_from="--no-index --find-links /wheels"
  fi
  local index
  index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
  if [[ -z $uv_config && -n $index ]]; then
    uv_config=$(mktemp)
    trap 'rm -f "$uv_config"' EXIT
    printf '[[index]]\nurl = "%s"\ndefault = true\n' "$index" >"$uv_config"
  fi
}

read_public_images() {
  local key value
  while IFS='=' read -r key value; do
    [[ $key != *_IMAGE || -n ${!key:-} ]] || declare -g "$key=$value"
  done <images/public.env
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

main "$@"
