#!/bin/bash
# Every model on every benchmark, a task of an array job each, and one table of them all.
#
#   bash slurm/evaluate.sh OUT MODEL ... -- NAME=FILE ... [-- key=value ...]
#
# MODEL: a Hugging Face directory, such as runs/NAME/hf; FILE: a benchmark's JSONL or Parquet;
# key=value: settings of `sgopd evaluate`. Account, partition and the like come from sbatch's own
# variables (SBATCH_ACCOUNT, ...); SGOPD_GPUS is the number of GPUs of a task. The same command again
# does what is left. OUT/MODEL/NAME/ has each evaluation, OUT/table.txt and OUT/table.json the table.
#
#SBATCH --job-name=sgopd-evaluate
#SBATCH --nodes=1
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail

usage() {
    echo "usage: bash slurm/evaluate.sh OUT MODEL ... -- NAME=FILE ... [-- key=value ...]" >&2
    exit 2
}

ROOT=${SGOPD_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $ROOT/slurm/lib/settings.sh ]]; then
    echo "sgopd: there is no slurm/lib in $ROOT: call it in the project's folder, or export" \
        "SGOPD_ROOT" >&2
    exit 2
fi
cd "$ROOT"

ARGUMENTS=("$@") MODELS=() BENCHMARKS=() SETTINGS=() part=0
OUT=${1:-}
for word in "${@:2}"; do
    if [[ $word == -- ]]; then
        part=$((part + 1))
    elif ((part == 0)); then
        MODELS+=("${word%/}")
    elif ((part == 1)); then
        BENCHMARKS+=("$word")
    else
        SETTINGS+=("$word")
    fi
done
COUNT=$((${#MODELS[@]} * ${#BENCHMARKS[@]}))
if [[ -z $OUT || $OUT == -* ]] || ((COUNT == 0)); then usage; fi
FOLDERS=() # below OUT, of each task
for model in "${MODELS[@]}"; do
    label=${model//\//-} # two models may both end in hf
    for benchmark in "${BENCHMARKS[@]}"; do
        name=${benchmark%%=*}
        [[ $benchmark == ?*=?* && $name != */* ]] || usage
        if [[ " ${FOLDERS[*]} " == *" ${label#-}/$name "* ]]; then
            echo "sgopd: two evaluations would be $OUT/${label#-}/$name: give other names" >&2
            exit 2
        fi
        FOLDERS+=("${label#-}/$name")
    done
done

submit() { # OPTIONS...: this script again, with the same arguments
    local command=(sbatch --parsable "--output=$OUT/logs/%x_%j.out" "$@" slurm/evaluate.sh)
    if [[ -n ${SGOPD_DRY_RUN:-} ]]; then
        { printf '%q ' "${command[@]}" "${ARGUMENTS[@]}" && echo; } >&2
        echo JOB
    else
        "${command[@]}" "${ARGUMENTS[@]}"
    fi
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then # on a login node
    mkdir -p "$OUT/logs" # Slurm makes none
    # Whole nodes: the engines and the verifier use the CPUs, of which Slurm gives one by itself.
    array=$(submit "--array=0-$((COUNT - 1))" "--gpus-per-node=${SGOPD_GPUS:-8}" \
        --exclusive --mem=0 "--output=$OUT/logs/%x_%A_%a.out")
    table=$(submit --job-name=sgopd-table "--dependency=afterany:$array")
    echo "$COUNT evaluations are job $array, their table is job $table: $OUT/table.txt"
    exit 0
fi

# shellcheck source=slurm/lib/settings.sh
source slurm/lib/settings.sh

if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then # after all of them
    srun "${COMMON[@]}" --ntasks=1 "${SGOPD[@]}" cluster table "$OUT" "${FOLDERS[@]}"
    exit 0
fi
model=${MODELS[SLURM_ARRAY_TASK_ID / ${#BENCHMARKS[@]}]}
benchmark=${BENCHMARKS[SLURM_ARRAY_TASK_ID % ${#BENCHMARKS[@]}]}
folder=$OUT/${FOLDERS[SLURM_ARRAY_TASK_ID]}
echo "$model on $benchmark: $folder"
exec srun "${COMMON[@]}" --ntasks=1 "${SGOPD[@]}" evaluate "$model" "${SETTINGS[@]}" \
    --benchmark "$benchmark" --out "$folder"
