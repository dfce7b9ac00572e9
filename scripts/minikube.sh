#!/usr/bin/env bash
# Kubeflow Pipelines, MLflow and an object store on this machine.
#
#   scripts/minikube.sh up|down [--dry-run]      --dry-run prints each command instead of running it
#
# CPUS, MEMORY, DISK and DRIVER change the machine, KUBERNETES its version, MINIKUBE_PROFILE its name. `up` can be
# repeated: it goes on where it stopped, and brings a running one up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly profile=${MINIKUBE_PROFILE:-guardloop}
readonly kubernetes=${KUBERNETES:-v1.34.0} # one of the versions for which tests/manifests checks the objects
dry_run=

main() {
  local action=${1:-}
  case ${2:-} in
    "") ;;
    --dry-run) dry_run=yes ;;
    *) usage ;;
  esac
  case $action in
    up) up ;;
    down) run minikube delete --profile "$profile" ;;
    *) usage ;;
  esac
}

usage() {
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

up() {
  need minikube kubectl git
  start
  install_kfp
  make_secrets
  run_kubectl apply -k manifests/overlays/minikube
  wait_for_pods
  [[ $dry_run ]] || say_where
}

# Calico, since minikube's own network ignores network policies.
start() {
  run minikube start --profile "$profile" --kubernetes-version "$kubernetes" --cni calico \
    --cpus "${CPUS:-4}" --memory "${MEMORY:-12g}" --disk-size "${DISK:-60g}" ${DRIVER:+--driver "$DRIVER"}
}

install_kfp() {
  run_kubectl apply -k manifests/kfp/cluster-scoped
  run_kubectl wait --for condition=established --timeout 2m crd/applications.app.k8s.io crd/workflows.argoproj.io
  run_kubectl apply -k manifests/kfp/minikube
}

# The database's password is made here, once; MLflow uses the store with the keys that KFP made.
make_secrets() {
  local kubectl
  printf -v kubectl '%q ' kubectl --context "$profile" # text for a shell below
  # shellcheck disable=SC2016  # the template's variables, not ours
  local all='{{range $key, $value := .data}}{{printf "%s=%s\n" $key (base64decode $value)}}{{end}}'
  run_kubectl apply -f manifests/base/services/namespace.yaml
  run_line "${kubectl}get secret mlflow-database -n guardloop -o name ||
    head -c 24 /dev/urandom | base64 | tr -d '\n' |
    ${kubectl}create secret generic mlflow-database -n guardloop --from-literal username=mlflow --from-file password=/dev/stdin"
  run_line "${kubectl}get secret mlpipeline-minio-artifact -n kubeflow -o go-template='$all' |
    ${kubectl}create secret generic mlflow-object-store -n guardloop --from-env-file /dev/stdin --dry-run=client -o yaml |
    ${kubectl}apply -f -"
}

wait_for_pods() {
  run_kubectl wait --for condition=available --timeout 20m --all deployment -n kubeflow
  run_kubectl rollout status statefulset/postgres -n guardloop --timeout 10m
  run_kubectl rollout status deployment/mlflow -n guardloop --timeout 10m
}

say_where() {
  cat <<END

Kubeflow Pipelines  kubectl --context $profile port-forward -n kubeflow svc/ml-pipeline-ui 8080:80
                    http://localhost:8080
MLflow              kubectl --context $profile port-forward -n guardloop svc/mlflow 5000:5000
                    http://localhost:5000
Next                docs/kubernetes.md
END
}

need() {
  local tool
  for tool in "$@"; do
    if [[ ! $dry_run ]] && ! command -v "$tool" >/dev/null; then
      echo "$tool is needed, and is not installed." >&2
      exit 2
    fi
  done
}

run_kubectl() {
  run kubectl --context "$profile" "$@"
}

run() {
  local line
  printf -v line '%q ' "$@"
  echo "+ ${line% }"
  [[ $dry_run ]] || "$@"
}

run_line() {
  echo "+ $1"
  [[ $dry_run ]] || bash -o pipefail -ec "$1"
}

main "$@"
