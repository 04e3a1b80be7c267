# shellcheck shell=bash disable=SC2153  # DEVICE and others: set by the scripts
# What the launch scripts share (sourced, not run): Python, devices, nodes, and handing signals to the trainers.
#
# They set DEVICE, GPUS, MODEL, OUTPUT, LOG_DIR and REHEARSAL (flags that make a run short enough for a CPU), call
# start_command, append the trainer's flags to COMMAND, and call run_command. The fine-tuning scripts set RECIPE, GPUS,
# MODEL, DATA, OUTPUT and REHEARSAL and call finetune.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { echo "launch: $*" >&2; }
fail() { # code 2, as the trainers for wrong flags
  echo "launch: error: $*" >&2
  exit 2
}

dry_run() { [ "${DRY_RUN:-0}" != 0 ]; }

is_count() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

# PYTHON: the user's, else the one that setup.sh made, else the first in PATH.
choose_python() {
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=$(command -v python || command -v python3) ||
      fail "no Python: bash scripts/setup.sh sets one up, or set PYTHON"
  fi
}

# DEVICES (array) and NUM_DEVICES from GPUS: a list of at least two (0,1,2,3), or a number of devices.
# (CUDA_VISIBLE_DEVICES=3 GPUS=1 is the card 3 alone.)
choose_devices() {
  local available=() device why
  case $DEVICE in
    cpu | gpu) ;;
    *) fail "DEVICE must be gpu or cpu; got \"$DEVICE\"" ;;
  esac
  if is_count "$GPUS"; then
    NUM_DEVICES=$GPUS
    mapfile -t DEVICES < <(seq 0 $((NUM_DEVICES - 1)))
  elif [[ $GPUS =~ ^[A-Za-z0-9-]+(,[A-Za-z0-9-]+)+$ ]]; then
    IFS=, read -ra DEVICES <<<"$GPUS"
    NUM_DEVICES=${#DEVICES[@]}
  else
    fail "GPUS must be a list (0,1,2,3) or a number of GPUs (4); got \"$GPUS\""
  fi
  [ "$DEVICE" = gpu ] || return 0

  # Paddle's launcher takes the names in CUDA_VISIBLE_DEVICES (a batch system sets it), not positions in it.
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    why="CUDA_VISIBLE_DEVICES is empty"
    IFS=, read -ra available <<<"$CUDA_VISIBLE_DEVICES"
  elif ! dry_run; then
    why="nvidia-smi lists none"
    mapfile -t available < <(nvidia-smi -L 2>/dev/null | sed -n 's/^GPU \([0-9]*\):.*/\1/p')
  else
    return 0 # a dry run may describe another machine
  fi
  if [ ${#available[@]} = 0 ]; then
    fail "no NVIDIA GPU here ($why). To rehearse on the CPU, with the quickstart's model or another small one:
  DEVICE=cpu MODEL=output/quickstart/pretrained DATA= bash scripts/$(basename "$0") $REHEARSAL"
  fi
  if [ "$NUM_DEVICES" -gt ${#available[@]} ]; then
    fail "GPUS=$GPUS asks for $NUM_DEVICES GPUs, but ${#available[@]} can be seen (${available[*]}): set GPUS"
  fi
  [[ $GPUS == *,* ]] || DEVICES=("${available[@]:0:NUM_DEVICES}")
  for device in "${DEVICES[@]}"; do
    [[ " ${available[*]} " == *" $device "* ]] || fail "GPUS=$GPUS: no GPU $device here (there are: ${available[*]})"
  done
}

# NNODES, and for several nodes MASTER (as an address) and NODE_RANK.
choose_nodes() {
  local name port address
  NNODES=${NNODES:-1}
  is_count "$NNODES" || fail "NNODES must be a number of nodes; got \"$NNODES\""
  [ "$NNODES" -gt 1 ] || return 0
  [ -n "${MASTER:-}" ] ||
    fail "NNODES=$NNODES needs MASTER=host:port on every node: the first node's name or address, and a free port there"
  [[ $MASTER =~ ^([A-Za-z0-9_][A-Za-z0-9_.-]*):([0-9]{1,5})$ ]] || fail "MASTER must be host:port; got \"$MASTER\""
  name=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
  [ -n "${NODE_RANK:-}" ] || fail "NNODES=$NNODES needs NODE_RANK: 0 on the node of MASTER, 1, 2, ... on the others"
  [[ $NODE_RANK =~ ^[0-9]{1,6}$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK must be from 0 to $((NNODES - 1)) (NNODES=$NNODES); got \"$NODE_RANK\""
  # The launcher compares MASTER with its own address as text: with a name no node would open the port, and all
  # would wait for ever.
  if ! [[ $name =~ ^[0-9.]+$ ]]; then
    address=$(getent ahostsv4 "$name" | sed -n '1s/ .*//p') || true
    if [[ $NODE_RANK = 0 && $address = 127.* ]]; then
      address=$(hostname -I | sed 's/ .*//') || true # /etc/hosts gives the host's own name a loopback address
    fi
    if [ -n "$address" ]; then
      MASTER=$address:$port
    else
      dry_run || fail "MASTER=$MASTER: the name $name has no IPv4 address here; use the address"
    fi
  fi
  if [ "$DEVICE" = cpu ]; then
    [ "$NNODES" -le 254 ] || fail "NNODES=$NNODES: at most 254 nodes on a CPU"
    if ! dry_run && [[ $MASTER != 127.* ]] && [[ " $(hostname -I) " != *" ${MASTER%:*} "* ]]; then
      fail "MASTER=$MASTER is another machine's, and CPU ranks work on one: start all NODE_RANKs there (DEVICE=cpu)"
    fi
  fi
}

# COMMAND: Python, and Paddle's launcher where there are several processes, up to the training script.
start_command() {
  choose_python
  choose_devices
  choose_nodes
  MAX_RESTART=${MAX_RESTART:-}
  [[ $MAX_RESTART =~ ^[0-9]{0,6}$ ]] || fail "MAX_RESTART must be a number of restarts; got \"$MAX_RESTART\""
  if [ "$DEVICE" = cpu ] && [ -z "${MODEL:-}" ]; then
    fail "DEVICE=cpu needs MODEL=<folder of a small model>: every process holds the whole of it in float32"
  fi

  COMMAND=("$PYTHON" -u)
  LAUNCHED=
  if [ "$NUM_DEVICES" = 1 ] && [ "$NNODES" = 1 ]; then return 0; fi
  LAUNCHED=yes
  COMMAND+=(-m paddle.distributed.launch)
  if [ "$DEVICE" = cpu ]; then
    COMMAND+=(--nproc_per_node "$NUM_DEVICES") # --gpus crashes in a CPU build of Paddle
  else
    COMMAND+=(--gpus "$(IFS=,; echo "${DEVICES[*]}")")
  fi
  if [ "$NNODES" -gt 1 ] && [ "$DEVICE" = cpu ]; then
    # CPU ranks are on one machine, which has an address for each node: no node needs to ask a master, whose port would
    # be open on every address of the machine.
    local i ips=127.0.1.1 # Paddle refuses 127.0.0.1 here
    for ((i = 2; i <= NNODES; i++)); do ips+=,127.0.1.$i; done
    COMMAND+=(--nnodes "$NNODES" --ips "$ips" --start_port "${MASTER##*:}" --host "127.0.1.$((NODE_RANK + 1))")
    LOG_DIR=$LOG_DIR/node-$NODE_RANK
  elif [ "$NNODES" -gt 1 ]; then
    COMMAND+=(--nnodes "$NNODES" --master "$MASTER" --rank "$NODE_RANK")
    # The first node's trainers meet at the address the launcher takes for its own. That is what the host's name
    # resolves to, which may be a loopback address or another network's: MASTER is the one the others can reach.
    if [ "$NODE_RANK" = 0 ]; then COMMAND+=(--host "${MASTER%:*}"); fi
    LOG_DIR=$LOG_DIR/node-$NODE_RANK # the nodes may share the folder, and every launcher writes workerlog.0
  fi
  if [ -n "$MAX_RESTART" ]; then COMMAND+=(--max_restart "$MAX_RESTART"); fi
  COMMAND+=(--log_dir "$LOG_DIR")
}

# Fine-tune as a recipe says, with the script's own arguments at the end, and leave with the exit code. Variables that
# all fine-tuning scripts take from the environment get their defaults here.
finetune() {
  local recipe=$RECIPE
  DEVICE=${DEVICE:-gpu}       # gpu, or cpu: then GPUS counts processes, and MODEL has to be a small one
  LOG_DIR=${LOG_DIR:-log}     # what each process says (workerlog.0, ...), where there are several
  OVERWRITE=${OVERWRITE:-1}   # as published, a run that OUTPUT holds is deleted; 0: go on from its checkpoint
  [ -f "$recipe" ] || recipe=$ROOT/configs/recipes/$RECIPE.yaml
  [ -f "$recipe" ] || fail "RECIPE must be a YAML file, or the name of one in $ROOT/configs/recipes; got \"$RECIPE\""
  start_command
  COMMAND+=(
    "$ROOT/llm/finetune_generation.py" "$recipe"
    ${MODEL:+--model_name_or_path "$MODEL"} ${DATA:+--dataset_name_or_path "$DATA"}
    --output_dir "$OUTPUT" --overwrite_output_dir "$OVERWRITE" --device "$DEVICE"
  )
  run_command "$@"
}

# Run COMMAND with the script's own arguments at the end (later flags win), and leave with its exit code.
run_command() {
  COMMAND+=("$@")
  if dry_run; then
    print_command
    exit 0
  fi
  if [ "$DEVICE" = cpu ]; then
    # As on a machine without GPUs; else the launcher would hand out those of this one.
    unset CUDA_VISIBLE_DEVICES
    export PADDLE_DISTRI_BACKEND=gloo
    make_secret
  fi

  # A later start goes on, also where the flags ask the first one to start anew.
  if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then COMMAND+=(--no_overwrite_output_dir); fi
  local code restarts=0
  stops=0 early='' launcher=''
  trap 'stop_trainers TERM' TERM HUP
  trap 'stop_trainers INT' INT
  while true; do
    run_once
    if [ "$code" = 0 ] || [ "$stops" -gt 0 ]; then break; fi
    # Paddle's launcher heeds --max_restart only with an etcd master. The trainers go on from their newest checkpoint;
    # code 2 means wrong flags, which another start would not mend.
    if [ "$code" = 2 ] || [ "$restarts" -ge "${MAX_RESTART:-0}" ]; then break; fi
    restarts=$((restarts + 1))
    say "the trainers ended with code $code: restart $restarts of $MAX_RESTART"
    if [ "$restarts" = 1 ]; then COMMAND+=(--no_overwrite_output_dir); fi
  done
  # 143: ended by SIGTERM. The launcher says 15 then, and 1 where it was waiting for the other nodes.
  if [ "$stops" -gt 0 ] && { [ "$code" = 15 ] || { [ -n "$early" ] && [ "$code" != 0 ]; }; }; then code=143; fi
  if [ "$code" != 0 ]; then
    say "the trainers ended with code $code${LAUNCHED:+; what they said is in $LOG_DIR/workerlog.*}"
  fi
  exit "$code"
}

# What the ranks of this launch prove to each other that they know (see docs/security.md): a file that has no name any
# more, which they read by way of this script's descriptor. Several scripts (NNODES) can share one that the user names.
make_secret() {
  local file descriptor
  if [ -n "${OARLOCK_LAUNCH_SECRET_FILE:-}" ] || [ -z "$LAUNCHED" ] || [ "$NNODES" != 1 ]; then return 0; fi
  file=$(mktemp) # readable by this user alone
  head -c 32 /dev/urandom >"$file"
  exec {descriptor}<"$file"
  rm -f "$file"
  export OARLOCK_LAUNCH_SECRET_FILE=/proc/$$/fd/$descriptor
}

print_command() {
  local word line=
  for word in "${COMMAND[@]}"; do
    [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  echo "${line# }"
}

# Start the launcher (or the only trainer) once; sets `code` when it has ended.
run_once() {
  local again=0
  # A process group of its own (set -m): Ctrl-C in a terminal then reaches this script alone.
  set -m
  "${COMMAND[@]}" </dev/null &
  launcher=$!
  set +m
  code=0
  wait "$launcher" || code=$?
  while [ "$code" -gt 128 ] && kill -0 "$launcher" 2>/dev/null; do # a trapped signal ends `wait` early
    code=0
    wait "$launcher" || code=$?
  done
  wait "$launcher" 2>/dev/null || again=$? # it may have ended while a trap ran; 127: its code was told already
  if [ "$again" != 127 ]; then code=$again; fi
}

# Trap. The signal goes to the trainers, past the launcher: that one would repeat it to one trainer after the other,
# kill those that have not saved after 30 seconds, and leave with code 15 although they had.
stop_trainers() {
  local trainers signal=TERM
  [ -n "$launcher" ] || exit 143
  if [ "$1" = INT ] && [ "$stops" -gt 0 ]; then signal=INT; fi # the second Ctrl-C: stop without saving
  stops=$((stops + 1))
  mapfile -t trainers < <(find_trainers)
  if [ ${#trainers[@]} = 0 ]; then
    early=yes # still starting: nothing to save
    kill -TERM "$launcher" 2>/dev/null || true
  else
    say "passing SIG$signal to ${#trainers[@]} trainer(s)"
    kill "-$signal" "${trainers[@]}" 2>/dev/null || true
  fi
}

# Process ids of the trainers: the launcher's children that lead a session (its other children are brief helpers).
find_trainers() {
  local file line pid parent session
  if [ -z "$LAUNCHED" ]; then
    echo "$launcher"
    return
  fi
  for file in /proc/[0-9]*/stat; do
    { read -r line <"$file"; } 2>/dev/null || continue # it ended meanwhile
    pid=${line%% *}
    read -r _ parent _ session _ <<<"${line##*) }" # behind the name: state, parent, process group, session
    if [ "$parent" = "$launcher" ] && [ "$session" = "$pid" ]; then echo "$pid"; fi
  done
}
