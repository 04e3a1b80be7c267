#!/usr/bin/env bash
# Continue pretraining llama-7b in 4D: data, sharding, tensor and pipeline parallel. Variables: pretrain.sh.
#
# On 8 GPUs it is the published script: tensor 4 x pipeline 2, which leaves nothing for data and sharding (the log says
# that --sharding has no effect). On 32 GPUs, for example 4 nodes of 8, it runs
# data 2 x sharding 2 (stage 2) x tensor 4 x pipeline 2.
#
#   NNODES=4 MASTER=node1:29500 NODE_RANK=0 bash scripts/run_trainer_tp4pp2.sh    on node1; 1, 2, 3 on the others
#   sbatch scripts/launch.slurm                                                   the same with Slurm
GPUS=${GPUS:-0,1,2,3,4,5,6,7} OUTPUT=${OUTPUT:-output/llama_4d} TP=${TP:-4} PP=${PP:-2} \
  source "$(dirname "${BASH_SOURCE[0]}")/pretrain.sh" pretrain_4d_7b "$@"
