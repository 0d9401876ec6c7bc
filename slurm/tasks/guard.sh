#!/bin/bash
# On the last node: with --no-kill Slurm lets a job live on whose first node is lost, and with it the
# shell that would requeue it. Then this does.
#   guard.sh JOB
while sleep 10; do
    job=$(scontrol --oneliner show job "$1") || continue
    [[ $job =~ \ BatchHost=([^ ]+) ]] || continue
    first=${BASH_REMATCH[1]}
    [[ $job =~ \ NodeList=([^ ]+) ]] || continue
    if ! scontrol show hostnames "${BASH_REMATCH[1]}" | grep -qxF "$first"; then
        echo "the first node $first is lost: requeue"
        scontrol requeue "$1" && exit
    fi
done
