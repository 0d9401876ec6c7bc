"""Functions run in forked processes: imports are there already, memory is given back at the end.

A fork is taken before anything computes, so a child's heap holds its inputs and nothing else.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.distributed.failure import die_with_parent

TIMEOUT = timedelta(minutes=5)  # of a collective whose other rank has failed


class ChildFailed(RuntimeError):
    """An error in the child process, with its own traceback."""


def isolated(function: Callable[[], Any]) -> Any:
    """Run the function in a process of its own and give its result."""
    (result,) = _run([function])
    return result


def on_ranks(world_size: int, function: Callable[[], Any]) -> list[Any]:
    """Run the function on the ranks of a gloo group; results in rank order."""
    with tempfile.TemporaryDirectory(prefix="sgopd-bench-") as folder:
        store = Path(folder, "store")

        def on(rank: int) -> Any:
            join_group(store, rank, world_size)
            return function()

        return _run([partial(on, rank) for rank in range(world_size)])


def join_group(store: Path, rank: int, world_size: int, backend: str = "gloo") -> None:
    """Make this process a rank of the default group."""
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=TIMEOUT
    )


def _run(functions: list[Callable[[], Any]]) -> list[Any]:
    context = multiprocessing.get_context("fork")
    children = []
    for function in functions:
        own, other = context.Pipe(duplex=False)
        child = context.Process(target=_serve, args=(other, function))
        child.start()
        other.close()
        children.append((child, own))
    try:
        return [_result(own) for _, own in children]
    finally:
        for child, own in children:
            own.close()
            child.kill()  # it has answered, or another rank has failed
            child.join()


def _serve(answers: Connection, function: Callable[[], Any]) -> None:
    die_with_parent()
    torch.set_num_threads(1)  # a team of threads does not survive a fork: waiting for it never ends
    try:
        answer = (True, function())
    except BaseException:  # whatever it was, the parent must hear of it
        answer = (False, traceback.format_exc())
    answers.send(answer)


def _result(answers: Connection) -> Any:
    try:
        ok, value = answers.recv()
    except EOFError:
        raise ChildFailed("the process was killed, as happens where memory runs out") from None
    if not ok:
        raise ChildFailed(str(value).rstrip())
    return value
