"""The suite's own gloo ranks: processes of this machine that run one case after the other.

A foreign function may raise on one rank while the others wait in a collective, or wait for ever on
all. Either is an outcome of the case at hand: its ranks are ended (by pid) and the next case gets
fresh ones. Nothing here imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_sgopd.distributed.failure import die_with_parent
from megatron_sgopd.preflight.numerics.cases import Case
from megatron_sgopd.preflight.numerics.outcome import RankOutcome

START_S = 180.0  # imports of torch and of what the function needs
CASE_S = 60.0  # far above what any case takes
GRACE_S = 5.0  # for the other ranks, once one has failed
MAX_RESTARTS = 3  # per world size; each may have cost CASE_S


class Ranks:
    """Processes of one world size that answer `run` until `close`."""

    def __init__(self, world: int, function: str) -> None:
        self.world = world
        self._function = function
        self._workers: list[tuple[BaseProcess, Connection]] = []
        self._folder = Path()
        self._starts = 0
        self._fresh = True  # the function may import its package when it is first called

    def run(self, case: Case) -> list[RankOutcome] | str:
        """`rank.run_case` on every rank, in rank order; or what kept a rank from answering."""
        if not self._workers and self._starts > MAX_RESTARTS:
            return f"not run: {self._starts} times the ranks had to be ended"
        if not self._workers:
            self._start()
            ready = self._answers(START_S)  # they have imported what they need
            if isinstance(ready, str):
                return ready
        for _, connection in self._workers:
            connection.send_bytes(pickle.dumps(case))
        answers = self._answers(START_S if self._fresh else CASE_S)
        self._fresh = False
        if isinstance(answers, str):
            return answers
        if len({bool(answer.failure) for answer in answers}) > 1:
            self.close()  # those without an error may hold half of a collective
        return answers

    def _answers(self, timeout: float) -> list[RankOutcome] | str:
        """One answer of every rank, or what kept one from coming; then the ranks are gone."""
        got: dict[int, RankOutcome] = {}
        deadline = time.monotonic() + timeout
        while len(got) < self.world:
            open_ = {c: r for r, (_, c) in enumerate(self._workers) if r not in got}
            for connection in wait(list(open_), max(0.0, deadline - time.monotonic())):
                assert isinstance(connection, Connection), "only connections are waited for"
                rank = open_[connection]
                try:
                    got[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    return self._gone(f"rank {rank} died", True)
            failed = [rank for rank, answer in got.items() if answer.failure]
            if failed and len(got) < self.world:  # the rest may wait for it: not for long
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline and len(got) < self.world:
                if failed:
                    return self._gone(f"rank {failed[0]}: {got[failed[0]].failure}", False)
                silent = ", ".join(str(r) for r in range(self.world) if r not in got)
                return self._gone(f"rank {silent} gave no answer in {timeout:.0f} s", False)
        return [got[rank] for rank in range(self.world)]

    def _gone(self, message: str, with_log: bool) -> str:
        """Ends the ranks; the message, and the last that a rank printed."""
        lines: list[str] = []
        for rank in range(self.world) if with_log else ():
            if (path := self._folder / f"rank-{rank}.log").exists():
                lines += path.read_text(encoding="utf-8", errors="replace").split("\n")[-3:]
        self.close()
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{message}: {last.strip()}" if last else message

    def _start(self) -> None:
        self._starts += 1
        self._fresh = True
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="sgopd-numerics-"))
        for rank in range(self.world):
            own, other = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(other, rank, self.world, str(self._folder), self._function),
                daemon=True,
            )
            process.start()
            other.close()
            self._workers.append((process, own))

    def close(self) -> None:
        """Ends the ranks."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join(10)
        if self._workers:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._workers = []


def _serve(connection: Connection, rank: int, world: int, folder: str, function: str) -> None:
    """A rank's whole life; ends with the parent, whose pipe then reads EOF."""
    die_with_parent()
    log = os.open(f"{folder}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch
    import torch.distributed as dist

    from megatron_sgopd.preflight.numerics.adapter import load
    from megatron_sgopd.preflight.numerics.rank import run_case

    torch.set_num_threads(1)
    load(function)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    connection.send_bytes(pickle.dumps(RankOutcome()))
    while True:
        try:
            case = pickle.loads(connection.recv_bytes())
        except EOFError:
            sys.exit(0)
        connection.send_bytes(pickle.dumps(run_case(function, case)))


@contextmanager
def ranks(world: int, function: str) -> Iterator[Ranks]:
    """The ranks of one world size, ended on the way out."""
    started = Ranks(world, function)
    try:
        yield started
    finally:
        started.close()
