#!/usr/bin/env bash
# Full fine-tuning on 4 GPUs, tensor 2 x pipeline 2: the published command, with its tiny model. Variables: finetune.sh.
GPUS=${GPUS:-4,5,6,7} MODEL=${MODEL:-__internal_testing__/tiny-random-llama} \
  source "$(dirname "${BASH_SOURCE[0]}")/finetune.sh" "${RECIPE:-full_pipeline_7b}" "$@"
