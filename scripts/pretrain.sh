#!/usr/bin/env bash
# Pretrain a model, or continue its pretraining, as a recipe says.
#
#   bash scripts/pretrain.sh RECIPE [FLAGS]     RECIPE: a name in configs/recipes, or a YAML file
#                                               FLAGS of llm/run_pretrain.py; they win over the recipe
#   DRY_RUN=1 bash scripts/pretrain.sh pretrain_13b              print the command
#   GPUS=4 MODEL=my-llama bash scripts/pretrain.sh pretrain_7b   four GPUs, another model
#   DEVICE=cpu GPUS=2 MODEL=output/quickstart/pretrained bash scripts/pretrain.sh pretrain_7b --max_steps 5 \
#     --max_seq_length 128 --max_evaluate_steps 4                rehearse it on the CPU
#
#   MODEL=DIR        a built-in name or a folder (default: the recipe's)
#   MODEL_TYPE=NAME  family of the model (default: the recipe's)
#   TOKENIZER=DIR    a name or a folder (default: the model's)
#   DATA=DIR         folder of .bin/.idx files (default: the recipe's); empty: the embedded text
#   OUTPUT=DIR       where the run goes (default: output/pretrain)
#   TP=N, PP=N       tensor and pipeline parallel degree (default: the recipe's). With either of them, also:
#   SHARDING_DEGREE=N  default: 2 if TP x PP leaves an even number of ranks, else all ranks that are left
#   SHARDING=STAGE     default: stage2, or stage1 if a single rank is left
#   All other variables: launch_common.sh.
set -euo pipefail

OUTPUT=${OUTPUT:-output/pretrain}
LOG_DIR=${LOG_DIR:-${OUTPUT}_log}

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
[ $# -gt 0 ] || fail "usage: bash scripts/pretrain.sh RECIPE [FLAGS]; the recipes are in $ROOT/configs/recipes"
name=${0##*/}
if [ "$name" = pretrain.sh ]; then name="$name $1"; fi
degrees=()
if [ -n "${TP:-}${PP:-}" ]; then
  degrees=("--tp=${TP:-1}" "--pp=${PP:-1}")
  degrees+=(${SHARDING_DEGREE:+"--sharding_degree=$SHARDING_DEGREE"} ${SHARDING:+"--sharding=$SHARDING"})
fi
if [ "$DEVICE" = cpu ] && [ ! -e data ]; then DATA=${DATA-}; fi # without data, a rehearsal reads the embedded text
tokenizer=${TOKENIZER:-${MODEL:-}}
launch "$name --max_steps 5 --max_seq_length 128 --max_evaluate_steps 4" ${degrees[@]+"${degrees[@]}"} \
  pretrain "$1" \
  ${MODEL_TYPE:+--model_type "$MODEL_TYPE"} ${MODEL:+--model_name_or_path "$MODEL"} \
  ${tokenizer:+--tokenizer_name_or_path "$tokenizer"} ${DATA+--input_dir "$DATA"} --output_dir "$OUTPUT" "${@:2}"
