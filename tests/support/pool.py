"""Worker pools for multi-rank tests: the ranks start once per world size and serve many tests.

Starting ranks costs seconds of imports, so no test starts its own. A test calls
`pool(2).run(function, *args)`: every rank runs the module-level function under gloo, and the
results come back in rank order. An exception on a rank is raised in the test with that rank's
traceback; after an exception or a hang the pool's processes are ended (by pid) and the next test
gets fresh ones, since the other ranks may sit in a collective.
"""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support import pool_worker

TIMEOUT_S = 240.0  # the first call includes the ranks' imports


class RankError(AssertionError):
    """A rank failed or hung; the message holds its traceback and the end of its output."""


class Pool:
    """The ranks of one world size."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = Path()  # while the ranks are up

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_S
    ) -> list[Any]:
        """`function(*args)` on every rank; results in rank order."""
        if not self._workers:
            self._start()
        # Plain pickle: torch's own reduction would send tensors as open files of shared memory.
        call = pickle.dumps((function, args))
        for _, connection in self._workers:
            connection.send_bytes(call)
        results: dict[int, Any] = {}
        ranks = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        deadline = time.monotonic() + timeout
        while len(results) < self.world_size:
            ready = wait(set(ranks) - {self._workers[r][1] for r in results}, 1.0)
            for connection in ready:
                assert isinstance(connection, Connection), "only connections are waited for"
                rank = ranks[connection]
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except EOFError:
                    ok, value = False, f"rank {rank} died"
                if not ok:
                    self._fail(f"rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
            if time.monotonic() > deadline:
                silent = sorted(set(range(self.world_size)) - set(results))
                self._fail(f"ranks {silent} of {self.world_size} gave no answer in {timeout:.0f} s")
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix=f"sgopd-pool-{self.world_size}-"))
        store = self._folder / "store"
        for rank in range(self.world_size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=pool_worker.serve,
                args=(theirs, rank, self.world_size, str(store), str(self._log(rank))),
                daemon=False,  # a rank that saves a checkpoint has children of its own
            )
            process.start()
            theirs.close()
            self._workers.append((process, mine))

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.log"

    def _fail(self, message: str) -> None:
        ends = []
        for rank in range(self.world_size):
            text = self._log(rank).read_text(errors="replace") if self._log(rank).exists() else ""
            ends.append(f"--- output of rank {rank}\n{text[-1500:]}")
        self.close()
        raise RankError(message + "\n" + "\n".join(ends))

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
