"""What a pool's rank runs: joins gloo, then calls what it is sent until the pipe closes."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1


def serve(connection: Connection, rank: int, world_size: int, store: str, log: str) -> None:
    """The rank's whole life; ends with the parent (the pipe reads EOF)."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        SGOPD_DEVICE="cpu",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    # A rank stuck in a collective never reads its pipe: it must go when the test session is gone.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch
    import torch.distributed as dist

    from megatron_sgopd.distributed import megatron_cpu

    torch.set_num_threads(1)
    megatron_cpu.install(torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            sys.exit(0)
        try:
            answer = (True, function(*args))
        except BaseException:  # whatever it was, the test must hear of it
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
