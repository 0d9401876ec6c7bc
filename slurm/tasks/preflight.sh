#!/bin/bash
# On every node: one line, NODE SECONDS VERDICT, whatever state the python environment is in.
#   preflight.sh PYTHON ARGUMENTS...
"$@" --node "$SLURMD_NODENAME" || {
    code=$?
    echo "$SLURMD_NODENAME $(date +%s) the python environment: $1 ended with exit code $code"
}
