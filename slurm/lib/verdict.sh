# shellcheck shell=bash disable=SC2034,SC2153 # names are shared with the others
# How a job ends: with the run's verdict, or in the queue again. Sourced after steps.sh.

TRAINER_CODE=0

listen_for_signals() {
    trap 'on_signal USR1' USR1 # the time limit is near
    trap 'on_signal TERM' TERM # scancel, or preemption
}

on_signal() {
    say "$1: asking the trainers for a checkpoint"
    STOPPING=$1
}

newest_checkpoint() { # step-00000050
    local found=("${RUN_DIR:?}"/checkpoints/step-????????)
    if [[ -d ${found[-1]} ]]; then basename "${found[-1]}"; else echo 'the start'; fi
}

begin_attempt() {
    [[ -z $DRY_RUN ]] || return 0
    mkdir -p "$LOGS"
    # A person who submits again has all requeues before them.
    if ((RESTART == 0)); then rm -f "$RUN_DIR/requeues"; fi
    BEGAN_AT=$(newest_checkpoint)
}

settle() { # ends this shell
    local status account code=0
    [[ -z $DRY_RUN ]] || exit 0
    if [[ -n $GUARD_PID ]]; then kill -TERM "$GUARD_PID" 2> /dev/null || true; fi
    status=$(cat "$RUN_DIR/status" 2> /dev/null || echo none)
    if [[ -n $TRAINER_PID ]]; then
        say "the trainers ended with exit code $TRAINER_CODE, status $status"
    fi
    if [[ $status == finished ]]; then
        rm -f "$RUN_DIR/requeues"
        say "finished: $RUN_DIR/summary.json"
        exit 0
    fi
    if [[ $STOPPING == TERM ]]; then
        say "cancelled at $(newest_checkpoint); the same sbatch resumes it"
        exit 143
    fi
    if [[ $status == stopped && -z $STOPPING ]]; then
        say "stopped on request at $(newest_checkpoint); the same sbatch resumes it"
        exit 0
    fi
    if [[ $STOPPING == USR1 && ($status == stopped || -z $TRAINER_PID) ]]; then
        requeue "time limit" 0
    elif [[ $STOPPING == ENGINES ]]; then
        requeue "engines lost" 1
    fi
    account=$(step 0 1 1 "${SGOPD[@]}" cluster account "$RUN_DIR") || code=$?
    say "${account:-no account of the failure could be had}"
    if ((code == 2)); then exit 2; fi
    requeue "failure" 1
}

requeue() { # WHY COUNT: COUNT where the attempt got to a new checkpoint, one more where it did not
    local count=$2
    if [[ $(newest_checkpoint) == "$BEGAN_AT" ]]; then
        count=$(($(cat "$RUN_DIR/requeues" 2> /dev/null || echo 0) + 1))
    fi
    echo "$count" > "$RUN_DIR/requeues.tmp" && mv "$RUN_DIR/requeues.tmp" "$RUN_DIR/requeues"
    if ((count > MAX_REQUEUES)); then
        say "giving up ($1): requeue $count without a new checkpoint, SGOPD_MAX_REQUEUES is" \
            "$MAX_REQUEUES" >&2
        exit 1
    fi
    say "requeue ($1; $count of $MAX_REQUEUES without progress), from $(newest_checkpoint)"
    # The requeue ends this shell. Were it gone at once, Slurm might take that for the job's end.
    trap '' TERM USR1
    scontrol requeue "$JOB" || { say "Slurm refuses: submit again, it resumes" >&2 && exit 1; }
    sleep 600
    exit 1
}
