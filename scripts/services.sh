#!/usr/bin/env bash
# An S3 store (rclone) and an MLflow server that keeps its artifacts there, on 127.0.0.1, until Ctrl-C.
#
#   S3_PORT=9000 MLFLOW_PORT=5001 scripts/services.sh
#
# What they keep is in $GUARDLOOP_HOME/services (.guardloop/services), the keys too; the next start finds it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bin=$PWD/.venv/bin
[[ -z ${PYTHON:-} ]] || bin=$(dirname "$PYTHON")
readonly bin
folder=$(realpath -m "${GUARDLOOP_HOME:-.guardloop}/services")
readonly folder bucket=guardloop s3_port=${S3_PORT:-9000} mlflow_port=${MLFLOW_PORT:-5001}
readonly s3=http://127.0.0.1:$s3_port mlflow=http://127.0.0.1:$mlflow_port variables=$folder/env
jobs=()

main() {
  trap stop EXIT
  trap 'exit 0' INT TERM
  umask 077
  mkdir -p "$folder/buckets/$bucket"
  refuse_taken_port "$s3_port" S3_PORT
  refuse_taken_port "$mlflow_port" MLFLOW_PORT
  write_variables
  # shellcheck source=/dev/null
  source "$variables"
  unset MLFLOW_TRACKING_URI # the server's own store is its database

  # By environment, since everyone on this machine sees arguments; quoted, since rclone takes a comma for a second key.
  RCLONE_CONFIG=/dev/null RCLONE_AUTH_KEY="\"$AWS_ACCESS_KEY_ID,$AWS_SECRET_ACCESS_KEY\"" \
    start s3 "$bin/rclone" serve s3 --addr "127.0.0.1:$s3_port" "$folder/buckets"
  MLFLOW_S3_ENDPOINT_URL=$s3 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
    start mlflow "$bin/python" -m mlflow server \
    --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "s3://$bucket/mlflow"
  wait_for s3 "$s3_port" "/"
  wait_for mlflow "$mlflow_port" "/health"

  cat <<TEXT
S3 store  $s3  bucket s3://$bucket
MLflow    $mlflow

In another terminal, for \`make run\` with PLATFORM=local or docker:

  source $variables

Ctrl-C stops both; what they keep stays in $folder.
TEXT
  wait -n "${jobs[@]}" || true
  echo "A service ended by itself; its log: $folder/*.log" >&2
  exit 1
}

# The secret is drawn once and only this user can read it.
write_variables() {
  local secret
  secret=$(sed -n 's/^export AWS_SECRET_ACCESS_KEY=//p' "$variables" 2>/dev/null || true)
  cat >"$variables" <<TEXT
export MLFLOW_TRACKING_URI=$mlflow
export AWS_ENDPOINT_URL=$s3
export AWS_ACCESS_KEY_ID=guardloop
export AWS_SECRET_ACCESS_KEY=${secret:-$("$bin/python" -c 'import secrets; print(secrets.token_hex(20))')}
export AWS_DEFAULT_REGION=us-east-1
TEXT
}

# start NAME COMMAND...: in a process group of its own, so that its children end with it.
start() {
  local name=$1
  shift
  set -m
  "$@" >"$folder/$name.log" 2>&1 </dev/null &
  jobs+=($!)
  set +m
}

wait_for() { # NAME PORT PATH
  local tries
  for ((tries = 0; tries < 600; tries++)); do
    answers "$2" "$3" && return
    if ! kill -0 "${jobs[-1]}" 2>/dev/null; then
      break
    fi
    sleep 0.2
  done
  echo "$1 did not start. The end of $folder/$1.log:" >&2
  tail -n 10 "$folder/$1.log" >&2
  exit 1
}

answers() { # PORT PATH: any HTTP answer counts
  "$bin/python" - "http://127.0.0.1:$1$2" <<'PYTHON' 2>/dev/null
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=2)
except urllib.error.HTTPError:
    pass
PYTHON
}

refuse_taken_port() { # PORT VARIABLE
  if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then
    echo "Port $1 is taken. Choose another: make services $2=..." >&2
    exit 2
  fi
}

# shellcheck disable=SC2317,SC2329  # the trap calls it
stop() {
  local job
  for job in "${jobs[@]}"; do
    kill -- "-$job" 2>/dev/null || true
  done
  wait
}

main "$@"
