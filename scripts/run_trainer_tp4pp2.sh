#!/usr/bin/env bash
# Continue pretraining llama-7b in 4D: data, sharding, tensor and pipeline parallel.
#
#   bash scripts/run_trainer_tp4pp2.sh [FLAGS]     FLAGS of llm/run_pretrain.py, which go over the ones below
#
# On 8 GPUs it is the published script: tensor 4 x pipeline 2, which leaves nothing for data and sharding (the program
# says that --sharding is not in effect). On 32 GPUs, for example 4 nodes of 8, it runs
# data 2 x sharding 2 (stage 2) x tensor 4 x pipeline 2.
#
#   NNODES=4 MASTER=node1:29500 NODE_RANK=0 bash scripts/run_trainer_tp4pp2.sh    on node1; 1, 2, 3 on the others
#   DRY_RUN=1 bash scripts/run_trainer_tp4pp2.sh                 print the command
#   DEVICE=cpu MODEL=output/quickstart/pretrained DATA= bash scripts/run_trainer_tp4pp2.sh FLAGS
#       rehearse the same ranks on the CPU; FLAGS as REHEARSAL below has them
#
# With Slurm: sbatch scripts/launch.slurm. SIGTERM and Ctrl-C let the trainers save a checkpoint and leave with code 0;
# the same command goes on from there.
set -euo pipefail

DEVICE=${DEVICE:-gpu}              # gpu, or cpu: then GPUS counts processes, and MODEL has to be given
GPUS=${GPUS:-0,1,2,3,4,5,6,7}      # GPUs of this node: a list, or how many
TP=${TP:-4}                        # tensor parallel degree
PP=${PP:-2}                        # pipeline parallel degree
SHARDING_DEGREE=${SHARDING_DEGREE:-} # default: 2 where TP x PP leave an even number of ranks, else all they leave
SHARDING=${SHARDING:-}             # default: stage2, and stage1 (as published) where one rank is left
if [ "$DEVICE" != cpu ]; then MODEL=${MODEL:-facebook/llama-7b}; fi # a built-in name or a folder
MODEL_TYPE=${MODEL_TYPE:-llama}
TOKENIZER=${TOKENIZER:-${MODEL:-}}
if [ "$DEVICE" = cpu ] && [ ! -e data ]; then DATA=${DATA-}; fi # a rehearsal needs no data
DATA=${DATA-./data}                # folder of .bin/.idx files; empty: the embedded text
OUTPUT=${OUTPUT:-output/llama_4d}
LOG_DIR=${LOG_DIR:-${OUTPUT}_log}  # what each process says (workerlog.0, ...)
NNODES=${NNODES:-1}                # for several nodes also: MASTER=host:port of the first, NODE_RANK=0, 1, ...
MAX_RESTART=${MAX_RESTART:-}       # start failed trainers again up to so many times
PYTHON=${PYTHON:-}                 # default: the repository's .venv, else the first in PATH
REHEARSAL="--max_steps 5 --max_seq_length 128 --max_evaluate_steps 4" # flags that make it short enough for a CPU

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

start_command

# All ranks = data x sharding x TP x PP; the program works out data from the others.
for name in TP PP ${SHARDING_DEGREE:+SHARDING_DEGREE}; do
  is_count "${!name}" || fail "$name must be a number of ranks; got \"${!name}\""
done
ranks=$((NUM_DEVICES * NNODES))
left=$((ranks / (TP * PP)))
if [ $((left * TP * PP)) != "$ranks" ]; then
  fail "$ranks ranks ($NNODES node(s) x $NUM_DEVICES) can't be divided by TP $TP x PP $PP = $((TP * PP)):" \
    "change GPUS, TP or PP"
fi
if [ -z "$SHARDING_DEGREE" ]; then
  if [ $((left % 2)) = 0 ]; then SHARDING_DEGREE=2; else SHARDING_DEGREE=$left; fi
fi
if [ $((left % SHARDING_DEGREE)) != 0 ]; then
  fail "SHARDING_DEGREE=$SHARDING_DEGREE does not divide the $left rank(s) that TP $TP x PP $PP leave of $ranks"
fi
if [ "$left" = 1 ]; then
  SHARDING=${SHARDING:-stage1} sharding_degree= # as published
else
  SHARDING=${SHARDING:-stage2} sharding_degree=$SHARDING_DEGREE
fi
say "$ranks ranks: data $((left / SHARDING_DEGREE)) x sharding $SHARDING_DEGREE ($SHARDING) x tensor $TP x pipeline $PP"

COMMAND+=(
  "$ROOT/llm/run_pretrain.py"
  --model_type "$MODEL_TYPE" --model_name_or_path "$MODEL" --tokenizer_name_or_path "$TOKENIZER"
  ${DATA:+--input_dir "$DATA"} --output_dir "$OUTPUT"
  --split "949,50,1" --max_seq_length 2048
  --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --per_device_eval_batch_size 4
  --use_flash_attention 1 --use_fused_rms_norm 0
  --fp16 --fp16_opt_level O2 --scale_loss 512
  --tensor_parallel_degree "$TP" --pipeline_parallel_degree "$PP" --virtual_pp_degree 1 --sequence_parallel 0
  --sharding "$SHARDING" ${sharding_degree:+--sharding_parallel_degree "$sharding_degree"}
  --learning_rate 0.00001 --min_learning_rate 0.000001 --lr_scheduler_type cosine
  --max_steps 10000 --save_steps 5000
  --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0
  --logging_steps 10 --dataloader_num_workers 1
  --eval_steps 1000 --report_to visualdl --disable_tqdm true
  --continue_training 1 --recompute 1 --do_train --do_eval
  --device "$DEVICE"
)
run_command "$@"
