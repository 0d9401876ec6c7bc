# shellcheck shell=bash disable=SC2034 # what is set here is used by those who source it
# Settings of a job, from Slurm, the environment and the site's optional file. Sourced.

if [[ -f ${SGOPD_SITE:-slurm/site.sh} ]]; then
    # shellcheck disable=SC1090
    source "${SGOPD_SITE:-slurm/site.sh}"
elif [[ -n ${SGOPD_SITE:-} ]]; then
    echo "sgopd: SGOPD_SITE is $SGOPD_SITE, which does not exist" >&2
    exit 2
fi

DRY_RUN=${SGOPD_DRY_RUN:+1}
JOB=${SLURM_JOB_ID:-0}
RESTART=${SLURM_RESTART_COUNT:-0}
NUM_NODES=${SLURM_JOB_NUM_NODES:-8}
# GPUs asked for (8, or TYPE:8), not those there are: --exclusive gives all.
GPUS=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
PROCESSES=${SGOPD_PROCESSES_PER_NODE:-${GPUS##*:}}
MAX_REQUEUES=${SGOPD_MAX_REQUEUES:-3}       # in a row, without a new checkpoint between them
PREFLIGHT_S=${SGOPD_PREFLIGHT_S:-120}       # for all nodes to answer
CLOCK_S=${SGOPD_CLOCK_S:-30}                # how far apart clocks may be
STARTUP_S=${SGOPD_STARTUP_S:-1800}          # for the servers to load their models
GRACE_S=${SGOPD_GRACE_S:-1800}              # for a checkpoint, once the engines are lost
ENGINE_RESTARTS=${SGOPD_ENGINE_RESTARTS:-3} # of each server
for name in MAX_REQUEUES PREFLIGHT_S CLOCK_S STARTUP_S GRACE_S ENGINE_RESTARTS; do
    if [[ ! ${!name} =~ ^(0|[1-9][0-9]*)$ ]]; then # said now, not hours later
        echo "sgopd: SGOPD_$name is ${!name}; a whole number is wanted" >&2
        exit 2
    fi
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
export SLURM_CPU_BIND=none # a rank's threads and its verifier's processes share the node's CPUs
unset SLURM_UNBUFFEREDIO SLURM_LABELIO # srun would mix, or mark, the lines that nodes answer with

if [[ -z ${SLURM_JOB_ID:-} && -z $DRY_RUN ]]; then
    echo "sgopd: not in a job: submit with sbatch, or set SGOPD_DRY_RUN=1" >&2
    exit 2
fi
if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    mapfile -t NODES < <(seq -f 'node%g' "$NUM_NODES")
fi
JOB_OPTIONS=(--nodes "$(IFS=, && echo "${NODES[*]}")" --processes-per-node "$PROCESSES" --job "$JOB")

# In every step: no input, and the container where one is named.
COMMON=(--input=none)
if [[ -n ${SGOPD_CONTAINER:-} ]]; then
    PYTHON=${SGOPD_PYTHON:-python3}
    COMMON+=(--container-image="$SGOPD_CONTAINER" --no-container-mount-home
        --container-mounts="$PWD:$PWD${SGOPD_MOUNTS:+,$SGOPD_MOUNTS}" --container-workdir="$PWD")
else
    PYTHON=${SGOPD_PYTHON:-$PWD/.venv/bin/python}
fi
SGOPD=("$PYTHON" -m megatron_sgopd)
