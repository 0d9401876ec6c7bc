#!/bin/bash
# On-policy distillation on a Slurm cluster; slurm/README.md says all of it.
#
#   sbatch [-N NODES] [other options of sbatch] slurm/sgopd_8node.sh [RECIPE] [key=value ...]
#
# Without arguments: recipes/qwen3_8node.yaml on 8 nodes of 8 GPUs. The same command resumes the run.
# SGOPD_DRY_RUN=1 bash slurm/sgopd_8node.sh ... prints the steps instead of running them.
#
#SBATCH --job-name=sgopd
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=%x_%j.out
#SBATCH --open-mode=append        # a requeued job goes on in the same file
#SBATCH --requeue
#SBATCH --no-kill                 # a lost node ends its step only: what was trained is saved first
#SBATCH --signal=B:USR1@1800      # to this shell, so long before the limit: more than a step takes
set -euo pipefail

# Slurm runs a copy of this file in its spool; the project is where sbatch was called.
ROOT=${SGOPD_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $ROOT/slurm/lib/steps.sh ]]; then
    echo "sgopd: there is no slurm/lib in $ROOT: submit from the project's folder, or export" \
        "SGOPD_ROOT" >&2
    exit 2
fi
cd "$ROOT"
# shellcheck source=slurm/lib/settings.sh
source slurm/lib/settings.sh
# shellcheck source=slurm/lib/steps.sh
source slurm/lib/steps.sh
# shellcheck source=slurm/lib/verdict.sh
source slurm/lib/verdict.sh

ARGUMENTS=("$@")
if [[ ${1:-} == -* ]]; then
    echo "sgopd: $1 came where a recipe or key=value is wanted; options of sbatch go before the" \
        "script: sbatch [OPTIONS] slurm/sgopd_8node.sh [RECIPE] [key=value ...]" >&2
    exit 2
fi
if (($# == 0)) || [[ $1 == *=* ]]; then
    ARGUMENTS=(recipes/qwen3_8node.yaml "$@")
fi
if [[ -n ${SGOPD_ENGINE_NODES:-} ]]; then
    ARGUMENTS+=("rollout.vllm.nodes=$SGOPD_ENGINE_NODES")
fi

listen_for_signals
place
if [[ $FINISHED == 1 ]]; then
    say "$RUN_DIR holds this very run, finished: nothing to do"
    exit 0
fi
begin_attempt
preflight
guard_first_node
start_engines
start_trainers
watch_steps
end_engines
settle
