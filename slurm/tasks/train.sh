#!/bin/bash
# One rank, with its place in the job under the names that torchrun uses.
#   train.sh COMMAND...
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
