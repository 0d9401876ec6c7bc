#!/usr/bin/env bash
# The loss on one GPU: its kernels checked against float64, then timed beside plain PyTorch,
# torch.compile and Liger's kernels. One call, under 9 minutes on an H200, which the shapes are for.
#
#   bash tools/gpu_bench.sh [--json FILE] [--seconds N] [--only check,kernels,...]
#
# Needs Python >= 3.11 with a torch >= 2.10 for CUDA and the Triton that it brings; nothing else of
# this project's requirements. PYTHON names the interpreter (python3). Peers are measured where they
# can be imported. The wheel to bring where there is no index, without what it depends on:
#
#   pip download --no-deps liger-kernel==0.8.5        (0.9 MiB)
#
# Exit status: 0 measured, 1 a check failed (nothing is timed then), 2 nothing can be measured here.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

if ! missing=$("$python" -c 'import torch, triton' 2>&1); then
    echo "gpu_bench: $python lacks torch or triton (${missing##*$'\n'}): name a Python with a torch" \
        "for CUDA, PYTHON=/path/to/python3 bash tools/gpu_bench.sh" >&2
    exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_bench: the torch of $python sees no GPU here; this is for a machine with one" >&2
    exit 2
fi
exec "$python" tools/gpu_bench.py "$@"
