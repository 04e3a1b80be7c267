#!/usr/bin/env bash
# Fine-tune a model as a recipe says.
#
#   bash scripts/finetune.sh RECIPE [FLAGS]     RECIPE: a name in configs/recipes, or a YAML file
#                                               FLAGS of llm/finetune_generation.py; they win over the recipe
#   DRY_RUN=1 bash scripts/finetune.sh lora_7b                        print the command
#   GPUS=1 DATA=my_dataset bash scripts/finetune.sh lora_7b --r 16    your data, on one GPU
#   DEVICE=cpu MODEL=output/quickstart/pretrained bash scripts/finetune.sh lora_7b --max_steps 5 --warmup_steps 1
#                                                                     rehearse it on the CPU
#
#   MODEL=DIR     a built-in name or a folder (default: the recipe's)
#   DATA=DIR      file, folder or hub name (default: the embedded instructions)
#   OUTPUT=DIR    where the run goes (default: ./checkpoints/)
#   OVERWRITE=0   resume the run in OUTPUT; by default it is deleted, as in the published commands
#   All other variables: launch_common.sh.
set -euo pipefail

OUTPUT=${OUTPUT:-./checkpoints/}
LOG_DIR=${LOG_DIR:-log}

# shellcheck source=scripts/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
[ $# -gt 0 ] || fail "usage: bash scripts/finetune.sh RECIPE [FLAGS]; the recipes are in $ROOT/configs/recipes"
name=${0##*/}
if [ "$name" = finetune.sh ]; then name="$name $1"; fi
launch "$name --max_steps 5 --warmup_steps 1 --gradient_accumulation_steps 2" \
  finetune "$1" \
  ${MODEL:+--model_name_or_path "$MODEL"} ${DATA:+--dataset_name_or_path "$DATA"} \
  --output_dir "$OUTPUT" --overwrite_output_dir "${OVERWRITE:-1}" "${@:2}"
