#!/usr/bin/env bash
# Start or stop a local S3 server (rclone) and an MLflow server that stores its artifacts there, for experiments.
#
#     docker/stack.sh up|down
#
# All files are in .stack/ (or $STACK): objects in s3/BUCKET, MLflow's database, logs, process IDs, variables in `env`.
set -euo pipefail
cd "$(dirname "$0")/.."
stack=${STACK:-$PWD/.stack}
bin=${BIN:-$PWD/.venv/bin}

# Also checks the command line: after a reboot the process ID may belong to another process.
running() {
  test -f "$stack/$1.pid" && [[ "$(ps -o args= -p "$(cat "$stack/$1.pid")" 2>/dev/null)" == *"$bin/"* ]]
}

free_port() { "$bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start NAME PORT COMMAND...: start COMMAND in the background and wait until it listens on PORT
start() {
  local name=$1 port=$2
  shift 2
  nohup "$@" >"$stack/$name.log" 2>&1 </dev/null &
  echo $! >"$stack/$name.pid"
  for _ in $(seq 300); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then return; fi
    running "$name" || break
    sleep 0.2
  done
  echo "$name did not start; see $stack/$name.log" >&2
  exit 1
}

down() {
  for name in mlflow s3; do
    if running "$name"; then
      kill "$(cat "$stack/$name.pid")"
      while running "$name"; do sleep 0.1; done
      echo "stopped $name"
    fi
    rm -f "$stack/$name.pid"
  done
}

show() {
  echo "The stack is running with these variables. Stop it with 'make stack-down'."
  echo
  sed 's/^/    /' "$stack/env"
  echo
  echo "    source ${stack#"$PWD/"}/env && scop run --out s3://scop/runs"
  echo
}

up() {
  if running s3 && running mlflow; then
    show
    return
  fi
  down
  mkdir -p "$stack/s3/scop"
  local s3 mlflow
  s3=$(free_port)
  mlflow=$(free_port)
  cat >"$stack/env" <<EOF
export AWS_ENDPOINT_URL_S3=http://127.0.0.1:$s3
export AWS_ACCESS_KEY_ID=scop-local-stack
export AWS_SECRET_ACCESS_KEY=not-a-secret-on-loopback
export AWS_REGION=us-east-1
export MLFLOW_TRACKING_URI=http://127.0.0.1:$mlflow
EOF
  source "$stack/env"
  # MLflow's server uses boto3, which reads AWS_DEFAULT_REGION.
  export AWS_DEFAULT_REGION=us-east-1 MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
  start s3 "$s3" "$bin/rclone" serve s3 --config /dev/null --addr "127.0.0.1:$s3" \
    --auth-key "$AWS_ACCESS_KEY_ID,$AWS_SECRET_ACCESS_KEY" "$stack/s3"
  start mlflow "$mlflow" "$bin/mlflow" server --host 127.0.0.1 --port "$mlflow" --workers 1 \
    --backend-store-uri "sqlite:///$stack/mlflow.db" --artifacts-destination s3://scop/mlflow
  show
}

case ${1:-} in
  up | down) "$1" ;;
  *) echo "usage: docker/stack.sh up|down" >&2; exit 2 ;;
esac
