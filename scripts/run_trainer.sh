#!/usr/bin/env bash
# Continue pretraining llama-7b on 8 GPUs with sharding stage 2: the published command, with its values as variables.
#
#   bash scripts/run_trainer.sh [FLAGS]     FLAGS of llm/run_pretrain.py, which go over the ones below
#
#   DRY_RUN=1 bash scripts/run_trainer.sh                        print the command
#   GPUS=4 MODEL=my-llama bash scripts/run_trainer.sh            four GPUs, another model
#   DEVICE=cpu MODEL=output/quickstart/pretrained DATA= bash scripts/run_trainer.sh FLAGS
#       rehearse the same ranks on the CPU; FLAGS as REHEARSAL below has them
#   NNODES=2 MASTER=node1:29500 NODE_RANK=0 bash scripts/run_trainer.sh     on node1; NODE_RANK=1 on the other
#
# SIGTERM and Ctrl-C let the trainers save a checkpoint and leave with code 0; the same command goes on from there.
set -euo pipefail

DEVICE=${DEVICE:-gpu}              # gpu, or cpu: then GPUS counts processes, and MODEL has to be given
GPUS=${GPUS:-0,1,2,3,4,5,6,7}      # GPUs of this node: a list, or how many
if [ "$DEVICE" != cpu ]; then MODEL=${MODEL:-facebook/llama-7b}; fi # a built-in name or a folder
MODEL_TYPE=${MODEL_TYPE:-llama}
TOKENIZER=${TOKENIZER:-${MODEL:-}}
if [ "$DEVICE" = cpu ] && [ ! -e data ]; then DATA=${DATA-}; fi # a rehearsal needs no data
DATA=${DATA-./data}                # folder of .bin/.idx files; empty: the embedded text
OUTPUT=${OUTPUT:-output/llama_hybid}
LOG_DIR=${LOG_DIR:-${OUTPUT}_log}  # what each process says (workerlog.0, ...)
NNODES=${NNODES:-1}                # for several nodes also: MASTER=host:port of the first, NODE_RANK=0, 1, ...
MAX_RESTART=${MAX_RESTART:-}       # start failed trainers again up to so many times
PYTHON=${PYTHON:-}                 # default: the repository's .venv, else the first in PATH
REHEARSAL="--max_steps 5 --max_seq_length 128 --max_evaluate_steps 4" # flags that make it short enough for a CPU

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"

start_command
COMMAND+=(
  "$ROOT/llm/run_pretrain.py"
  --model_type "$MODEL_TYPE" --model_name_or_path "$MODEL" --tokenizer_name_or_path "$TOKENIZER"
  ${DATA:+--input_dir "$DATA"} --output_dir "$OUTPUT"
  --split "949,50,1" --max_seq_length 2048
  --per_device_train_batch_size 1 --per_device_eval_batch_size 1
  --use_flash_attention 1 --use_fused_rms_norm 0
  --fp16 --fp16_opt_level O2 --scale_loss 1024
  --learning_rate 0.00001 --min_learning_rate 0.000005 --lr_scheduler_type cosine
  --max_steps 10000 --save_steps 5000
  --weight_decay 0.01 --warmup_ratio 0.01 --max_grad_norm 1.0
  --logging_steps 20 --dataloader_num_workers 1
  --sharding stage2
  --eval_steps 1000 --report_to visualdl --disable_tqdm true
  --continue_training 1 --recompute 1 --do_train --do_eval
  --device "$DEVICE"
)
run_command "$@"
