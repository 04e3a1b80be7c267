# shellcheck shell=bash
# Sourced by the launch scripts. They take these variables from the environment:
#
#   DEVICE=cpu         rehearse on the CPU: GPUS counts processes, and MODEL must be a small model (default: gpu)
#   GPUS=0,1,2,3       GPUs of this node: a list of at least two, or a number (default: all that can be seen)
#   NNODES=2           number of nodes; then also MASTER=host:port of the first node, and NODE_RANK=0, 1, ...
#   MAX_RESTART=3      restart failed trainers up to this many times; they resume from the newest checkpoint
#   LOG_DIR=DIR        output of each process (workerlog.0, ...)
#   PYTHON=python3.12  which Python (default: the repository's .venv, else the first in PATH)
#   DRY_RUN=1          print the command and exit
#
# SIGTERM and Ctrl-C let the trainers save a checkpoint and exit with code 0. The same command resumes from there.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DEVICE=${DEVICE:-gpu}

fail() { # code 2, as for wrong flags
  echo "launch: error: $*" >&2
  exit 2
}

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$ROOT/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=$(command -v python || command -v python3) ||
    fail "no Python found: run bash scripts/setup.sh, or set PYTHON"
fi

# launch REHEARSAL [OPTIONS] COMMAND RECIPE [FLAGS]: start a job with `oarlock launch`.
#
#   REHEARSAL   what follows `bash scripts/` in a command that is short enough for a CPU
#   OPTIONS     of `oarlock launch`, besides those that the variables above become
#   COMMAND     pretrain or finetune
launch() {
  local rehearsal="DEVICE=cpu MODEL=output/quickstart/pretrained DATA= bash scripts/$1" dry_run=()
  shift
  if [ "$DEVICE" = cpu ] && [ -z "${MODEL:-}" ]; then
    fail "DEVICE=cpu needs MODEL=<folder of a small model>: every process holds all of it in float32"
  fi
  if [ "${DRY_RUN:-0}" != 0 ]; then dry_run=(--dry_run); fi
  exec "$PYTHON" -u "$ROOT/llm/launch.py" ${dry_run[@]+"${dry_run[@]}"} "--device=$DEVICE" ${GPUS:+"--gpus=$GPUS"} \
    ${NNODES:+"--nnodes=$NNODES"} ${MASTER:+"--master=$MASTER"} ${NODE_RANK:+"--node_rank=$NODE_RANK"} \
    ${MAX_RESTART:+"--max_restart=$MAX_RESTART"} "--log_dir=$LOG_DIR" "--rehearsal=$rehearsal" "$@"
}
