#!/usr/bin/env bash
# Continue pretraining a model with a recipe of configs/recipes.
#
#   bash scripts/pretrain.sh RECIPE [FLAGS]     FLAGS of llm/run_pretrain.py; they win over the recipe
#
#   DRY_RUN=1 bash scripts/pretrain.sh pretrain_13b                         print the command
#   GPUS=4 MODEL=my-llama bash scripts/pretrain.sh pretrain_7b              four GPUs, another model
#   DEVICE=cpu GPUS=2 MODEL=output/quickstart/pretrained bash scripts/pretrain.sh pretrain_7b --max_steps 5 \
#     --max_seq_length 128                                                  rehearse it on the CPU
#
#   MODEL=DIR        a built-in name or a folder (default: the recipe's)
#   MODEL_TYPE=NAME  its family (default: the recipe's)
#   TOKENIZER=DIR    default: the model's
#   DATA=DIR         folder of .bin/.idx files (default: the recipe's); empty: the embedded text
#   OUTPUT=DIR       where the run goes (default: output/pretrain)
#   GPUS             default: all GPUs that can be seen
#   All other variables: launch_common.sh.
set -euo pipefail

OUTPUT=${OUTPUT:-output/pretrain}
LOG_DIR=${LOG_DIR:-${OUTPUT}_log}

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
degrees=()
if [ -n "${TP:-}${PP:-}" ]; then
  degrees=(--tensor "${TP:-1}" --pipeline "${PP:-1}" --sharding_degree "${SHARDING_DEGREE:-}" --sharding "${SHARDING:-}")
fi
# A rehearsal needs no data: the embedded text does.
if [ "$DEVICE" = cpu ] && [ ! -e data ]; then DATA=${DATA-}; fi
tokenizer=${TOKENIZER:-${MODEL:-}}
launch_recipe run_pretrain.py "--max_steps 5 --max_seq_length 128 --max_evaluate_steps 4" "${degrees[@]}" -- "$@" \
  ...
