"""`python -m tests.support.rank_program RUN_DIR BEHAVIOUR`: a rank of distributed/test_torchrun.

It stands in for `python -m megatron_sgopd train …`: the same signal handling and the same
`failing_together`, with a barrier for the training step and no model.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_sgopd.distributed.failure import die_with_parent, failing_together


def say(line: str) -> None:
    sys.stdout.write(line + "\n")  # at once: print writes the line's end by itself


def asked_to_stop(run_dir: Path, rank: int) -> bool:
    """Rank 0 looks, for all: ranks that look by themselves may disagree on when STOP came."""
    answer = [rank == 0 and (run_dir / "STOP").exists()]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def behave(run_dir: Path, behaviour: str, rank: int) -> None:
    fails = rank == dist.get_world_size() - 1
    if behaviour == "succeed":
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, rank)
        say(f"rank {rank} saw {everybody}")
        sys.stderr.write("\rbar 1/2\rbar 2/2" * (rank == 0))
        return
    if behaviour in ("work until STOP", "ignore STOP"):
        while not asked_to_stop(run_dir, rank) or behaviour == "ignore STOP":
            time.sleep(0.02)
        say(f"rank {rank} stopped on request")
        return
    if fails:
        if "killed" in behaviour:
            os.kill(os.getpid(), signal.SIGKILL)
        if "leaves" in behaviour:
            print("a library's last words", file=sys.stderr)
            os._exit(3)
        raise RuntimeError("the loss of rank 1 is not a number")
    if "sleep" in behaviour:
        time.sleep(600)
    dist.barrier()


def main(run_dir: Path, behaviour: str) -> None:
    die_with_parent()
    rank = int(os.environ["RANK"])
    for number in (signal.SIGTERM, signal.SIGUSR1):  # as training does: a request, no more
        signal.signal(number, lambda *_: None)
    with failing_together(run_dir, rank):
        dist.init_process_group("gloo")
        dist.barrier()
        pids = run_dir / "pids"
        pids.mkdir(exist_ok=True)
        (pids / str(rank)).write_text(f"{os.getpid()} {time.time()}")
        dist.barrier()
        behave(run_dir, behaviour, rank)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
