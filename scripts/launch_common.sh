# shellcheck shell=bash
# Sourced by the launch scripts. They take these variables from the environment:
#
#   DEVICE=cpu         rehearse on the CPU: GPUS counts processes, and MODEL must be a small model (default: gpu)
#   GPUS=0,1,2,3       GPUs of this node: a list of at least two, or a number (default: each script's)
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

# launch_recipe ENTRYPOINT REHEARSAL [OPTIONS] RECIPE [FLAGS]: start llm/ENTRYPOINT with `oarlock launch`.
#
#   REHEARSAL   flags that make the job short enough for a CPU
#   OPTIONS     more options of `oarlock launch`, each with a value
#   RECIPE      a YAML file, or the name of one in configs/recipes
#   FLAGS       of the entrypoint; they win over the recipe
launch_recipe() {
  local entrypoint=$1 rehearsal=$2 name=${0##*/} options=() recipe
  shift 2
  while [[ ${1:-} == --* ]]; do
    options+=("$1" "$2")
    shift 2
  done
  [ $# -gt 0 ] || fail "usage: bash scripts/$name RECIPE [FLAGS]; the recipes are in $ROOT/configs/recipes"
  recipe=$1
  [ -f "$recipe" ] || recipe=$ROOT/configs/recipes/$1.yaml
  [ -f "$recipe" ] || fail "RECIPE must be a YAML file, or the name of one in $ROOT/configs/recipes; got \"$1\""
  case $name in finetune.sh | pretrain.sh) name="$name $1" ;; esac
  shift
  if [ "$DEVICE" = cpu ] && [ -z "${MODEL:-}" ]; then
    fail "DEVICE=cpu needs MODEL=<folder of a small model>: every process holds all of it in float32"
  fi
  if [ "${DRY_RUN:-0}" != 0 ]; then options+=(--dry_run 1); fi
  exec "$PYTHON" -u "$ROOT/llm/launch.py" \
    --device "$DEVICE" --gpus "${GPUS:-}" --nnodes "${NNODES:-1}" --master "${MASTER:-}" \
    --node_rank "${NODE_RANK:-}" --max_restart "${MAX_RESTART:-}" --log_dir "$LOG_DIR" \
    --rehearsal "DEVICE=cpu MODEL=output/quickstart/pretrained DATA= bash scripts/$name $rehearsal" \
    ${options[@]+"${options[@]}"} "$ROOT/llm/$entrypoint" "$recipe" "$@"
}
