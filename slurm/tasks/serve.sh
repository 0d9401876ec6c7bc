#!/bin/bash
# One server of a node, on its own GPUs and port.
#   serve.sh GPUS FIRST_PORT COMMAND...
gpus=$1 port=$2
shift 2
if [[ ${SGOPD_DEVICE:-} != cpu ]]; then
    first=$((SLURM_LOCALID * gpus))
    CUDA_VISIBLE_DEVICES=$(seq -s , "$first" $((first + gpus - 1)))
    export CUDA_VISIBLE_DEVICES
fi
exec "$@" "rollout.vllm.host=$SLURMD_NODENAME" "rollout.vllm.port=$((port + SLURM_LOCALID))"
