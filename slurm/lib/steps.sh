# shellcheck shell=bash disable=SC2034,SC2153 # names are shared with settings.sh and verdict.sh
# The steps of a job, in the order of sgopd_8node.sh. Sourced after settings.sh.

TRAINER_PID="" GUARD_PID="" ENGINE_PIDS=() STOPPING=""

say() {
    printf '[%(%F %T)T] sgopd: %s\n' -1 "$*"
}

# -- srun ------------------------------------------------------------------------------------------

step() { # FIRST NODES TASKS COMMAND...: so many nodes from that one on, so many tasks on each
    with_options "$@"
    if [[ -n $DRY_RUN ]]; then
        printf '%q ' srun "${OPTIONS[@]}" "${@:4}" && echo
    else
        ${LIMIT_S:+timeout "$LIMIT_S"} srun "${OPTIONS[@]}" "${@:4}"
    fi
}

step_in_background() { # the same; STEP_PID is srun's, so that it gets the signals sent there
    if [[ -n $DRY_RUN ]]; then
        step "$@"
    else
        with_options "$@"
        srun "${OPTIONS[@]}" "${@:4}" &
        STEP_PID=$!
    fi
}

with_options() {
    OPTIONS=("${COMMON[@]}" --relative="$1" --nodes="$2" --ntasks-per-node="$3"
        --ntasks=$(($2 * $3)))
    if [[ -n ${LOG:-} ]]; then
        OPTIONS+=(--open-mode=append --output="$LOG")
    fi
}

# -- before training -------------------------------------------------------------------------------

place() { # where what runs: sets the names that `sgopd cluster place` prints
    local question answer name value code=0
    question=("${SGOPD[@]}" cluster place "${JOB_OPTIONS[@]}" "${ARGUMENTS[@]}")
    if [[ -n $DRY_RUN ]]; then
        answer=$("${question[@]}") || code=$?
    else
        answer=$(step 0 1 1 "${question[@]}") || code=$?
    fi
    if ((code)); then
        say "${SGOPD[*]} could not place this recipe (exit code $code, see above)" >&2
        exit "$code"
    fi
    while IFS='=' read -r name value; do
        case $name in
            OVERRIDES) read -ra OVERRIDES <<< "$value" ;;
            MASTER_ADDR | MASTER_PORT) export "$name=$value" ;;
            RUN_DIR | FINISHED | *_NODES | *_SERVERS | *_GPUS | *_PORT | *_URLS)
                declare -g "$name=$value"
                ;;
        esac
    done <<< "$answer"
    LOGS=$RUN_DIR/logs/$JOB.$RESTART
    say "job $JOB, restart $RESTART: $TRAINER_NODES nodes train, $ENGINE_NODES serve;" \
        "$PROCESSES processes a node; logs in $LOGS"
}

preflight() { # every node checks itself, and the bad ones are named
    local token=$JOB.$RESTART question answers began ended node clock verdict bad=0
    local -A verdicts=() clocks=()
    question=("${SGOPD[@]}" cluster preflight "${JOB_OPTIONS[@]}" --token "$token")
    question+=("${ARGUMENTS[@]}")
    if [[ -n $DRY_RUN ]]; then
        step 0 "${#NODES[@]}" 1 bash slurm/tasks/preflight.sh "${question[@]}"
        return
    fi
    echo "$token" > "$RUN_DIR/.preflight"
    began=$(date +%s)
    answers=$(
        LIMIT_S=$PREFLIGHT_S
        step 0 "${#NODES[@]}" 1 bash slurm/tasks/preflight.sh "${question[@]}"
    ) || true
    ended=$(date +%s)
    rm -f "$RUN_DIR/.preflight"
    while read -r node clock verdict; do
        if [[ -n $node ]]; then verdicts[$node]=$verdict clocks[$node]=$clock; fi
    done <<< "$answers"
    for node in "${NODES[@]}"; do
        verdict=${verdicts[$node]:-no answer within $((ended - began)) s (SGOPD_PREFLIGHT_S)}
        clock=${clocks[$node]:-$began}
        if [[ $verdict == ok ]] && ((clock < began - CLOCK_S || clock > ended + CLOCK_S)); then
            verdict="its clock is $((clock - began)) s off the first node's"
        fi
        if [[ $verdict != ok ]]; then
            say "preflight: $node: $verdict" >&2
            bad=1
        fi
    done
    if ((bad)); then
        say "preflight failed: mend what it says, or submit with --exclude=NODE" >&2
        exit 1
    fi
    say "preflight: all ${#NODES[@]} nodes are well"
}

guard_first_node() { # from the last one, whose Slurm commands need no container
    local COMMON=(--input=none) LOG="$LOGS/guard-%N.log"
    ((${#NODES[@]} > 1)) || return 0
    step_in_background $((${#NODES[@]} - 1)) 1 1 --overlap bash slurm/tasks/guard.sh "$JOB"
    [[ -n $DRY_RUN ]] || GUARD_PID=$STEP_PID
}

# -- engines ---------------------------------------------------------------------------------------

start_engines() { # one task a server, on the last nodes; returns when all are ready
    ((ENGINE_NODES > 0)) || return 0
    if [[ -z ${SGOPD_ENGINE_KEY:-} ]]; then # between the trainers and their servers
        SGOPD_ENGINE_KEY=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
        export SGOPD_ENGINE_KEY
    fi
    serve student "$STUDENT_SERVERS" "$STUDENT_GPUS" "$STUDENT_PORT"
    if ((TEACHER_SERVERS > 0)); then
        # After the student's, for a server measures what it finds free on its GPUs.
        wait_for_servers student "$STUDENT_URLS"
        serve teacher "$TEACHER_SERVERS" "$TEACHER_GPUS" "$TEACHER_PORT" --teacher
        wait_for_servers teacher "$TEACHER_URLS"
    else
        wait_for_servers student "$STUDENT_URLS"
    fi
}

serve() { # ROLE SERVERS GPUS FIRST_PORT [--teacher]
    LOG="$LOGS/$1-engine-%N.log" step_in_background "$TRAINER_NODES" "$ENGINE_NODES" "$2" \
        --overlap --kill-on-bad-exit=1 bash slurm/tasks/serve.sh "$3" "$4" \
        "${SGOPD[@]}" serve "${@:5}" --restarts "$ENGINE_RESTARTS" "${ARGUMENTS[@]}"
    [[ -n $DRY_RUN ]] || ENGINE_PIDS+=("$STEP_PID")
}

wait_for_servers() { # ROLE URLS
    local url deadline=$((SECONDS + STARTUP_S))
    [[ -z $DRY_RUN ]] || return 0
    for url in $2; do
        until is_healthy "$url"; do
            if [[ -n $STOPPING ]]; then return 0; fi
            if ! all_run "${ENGINE_PIDS[@]}" || ((SECONDS > deadline)); then
                say "the $1's server at $url did not come up, see $LOGS" >&2
                STOPPING=ENGINES
                return 0
            fi
            nap
        done
    done
    say "the $1's servers are ready: $2"
}

is_healthy() { # URL; without curl, which a cluster need not have
    local place=${1#http://} answer=""
    {
        exec {socket}<> "/dev/tcp/${place%:*}/${place#*:}" &&
            printf 'GET /health HTTP/1.0\r\n\r\n' >&"$socket" &&
            read -r -t 5 answer <&"$socket"
    } 2> /dev/null || return 1
    exec {socket}>&-
    [[ $answer == *" 200 "* ]]
}

end_engines() { # srun hands USR1 on, which `sgopd serve` takes for a request to end
    local pid tries=40
    if ((${#ENGINE_PIDS[@]} == 0)); then return; fi
    kill -USR1 "${ENGINE_PIDS[@]}" 2> /dev/null || true
    for pid in "${ENGINE_PIDS[@]}"; do
        while all_run "$pid" && ((tries-- > 0)); do nap; done
        kill -TERM "$pid" 2> /dev/null || true
        wait "$pid" || true
    done
}

# -- training --------------------------------------------------------------------------------------

start_trainers() { # one task a GPU, on the first nodes
    # Even where none are started: an earlier attempt's status is no verdict on this one.
    [[ -n $DRY_RUN ]] || rm -rf "$RUN_DIR/errors" "$RUN_DIR/status"
    if [[ -n $STOPPING ]]; then return; fi
    LOG="$LOGS/trainer-%N.log" step_in_background 0 "$TRAINER_NODES" "$PROCESSES" \
        --kill-on-bad-exit=1 --wait=60 bash slurm/tasks/train.sh \
        "${SGOPD[@]}" train "${ARGUMENTS[@]}" "${OVERRIDES[@]}"
    [[ -n $DRY_RUN ]] || TRAINER_PID=$STEP_PID
}

watch_steps() { # returns when the trainers are down
    local deadline=""
    if [[ -z $TRAINER_PID ]]; then return; fi
    while all_run "$TRAINER_PID"; do
        if [[ -z $STOPPING ]] && ! all_run "${ENGINE_PIDS[@]}"; then
            say "an engine's step has ended, see $LOGS: asking the trainers for a checkpoint"
            STOPPING=ENGINES deadline=$((SECONDS + GRACE_S))
        fi
        # Again and again: ranks that are still starting remove an old one.
        [[ -z $STOPPING ]] || touch "$RUN_DIR/STOP"
        if [[ -n $deadline ]] && ((SECONDS > deadline)); then
            say "no checkpoint within $GRACE_S s (SGOPD_GRACE_S): ending the trainers"
            kill -TERM "$TRAINER_PID" || true
            deadline=""
        fi
        nap
    done
    wait "$TRAINER_PID" || TRAINER_CODE=$?
}

all_run() { # PID...
    local pid
    for pid in "$@"; do kill -0 "$pid" 2> /dev/null || return 1; done
}

nap() { # a second, which a signal cuts short
    sleep 1 &
    wait "$!" || true
}
