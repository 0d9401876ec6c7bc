"""Starts the ranks of a run under torchrun and sees them through to their end.

Two processes stand above the ranks. The one a person started imports no torch and turns signals
into a request to stop (RUN_DIR/STOP, which the ranks look for after every step). Its child, `python
-m megatron_sgopd.distributed.torchrun`, is torchrun with its own account of a failure left out:
when all ranks are down it prints the first failing rank's error, last on the screen.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_sgopd.distributed.failure import account, die_with_parent, error_file, first_error
from megatron_sgopd.run_folder import ERRORS, ask_to_stop, set_status

GRACE_S = 4  # from a rank's failure to SIGKILL for those that do not come down by themselves
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_ranks(
    num_processes: int,
    arguments: list[str],
    run_dir: Path,
    module: str = "megatron_sgopd",
    stopping: str | None = "stopping after this step, with a checkpoint",
) -> int:
    """Runs `python -m MODULE ARGUMENTS` on that many local ranks; the exit code.

    `stopping` is said when a signal asks for the end; None: of ranks that do not look for such a
    request, the first signal ends them.

    0: finished, or stopped on request with a checkpoint; 1: failed.
    """
    shutil.rmtree(run_dir / ERRORS, ignore_errors=True)  # of an earlier attempt
    torchrun = ["--standalone", f"--nproc-per-node={num_processes}", "-m", module, *arguments]
    environment = {
        "OMP_NUM_THREADS": "1",
        # gloo on one machine: an address that resolves whatever the host is called
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
    # Where torchrun would keep its logs, of which there are none: it leaves the folder behind.
    with tempfile.TemporaryDirectory(prefix="sgopd-torchrun-") as logs:
        # A session of its own keeps a terminal's Ctrl-C from the ranks, which stop on request.
        agent = subprocess.Popen(
            [sys.executable, "-m", __name__, str(run_dir), "--log-dir", logs, *torchrun],
            env=environment,
            start_new_session=True,
        )
        stopper = _Stopper(agent, run_dir, stopping)
        code = stopper.wait()
        stopper.forget()
    if code < 0:  # torchrun itself was killed, and its ranks with it
        _set_failed(run_dir)
        print(f"\nthe run was killed (signal {-code})", file=sys.stderr, flush=True)
    return 0 if code == 0 else 1


class _Stopper:
    """First SIGINT, SIGTERM or SIGUSR1: ask the ranks to stop; the second SIGINT/SIGTERM: kill."""

    def __init__(self, agent: subprocess.Popen[bytes], run_dir: Path, stopping: str | None) -> None:
        self._stopping = stopping
        self._agent, self._run_dir, self._asked = agent, run_dir, False
        self._kept = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stopping is None or (self._asked and number != signal.SIGUSR1):
            self._agent.kill()
            return
        self._asked = True
        ask_to_stop(self._run_dir)
        print(
            f"\n{self._stopping}; Ctrl-C again to kill",
            file=sys.stderr,
            flush=True,
        )

    def wait(self) -> int:
        """The agent's exit code."""
        while True:
            try:
                return self._agent.wait(1.0)
            except subprocess.TimeoutExpired:
                if self._asked:  # again: ranks that were still starting have removed an old STOP
                    ask_to_stop(self._run_dir)

    def forget(self) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)


# -- the child -------------------------------------------------------------------------------------


def torchrun(run_dir: Path, arguments: list[str]) -> int:
    """torchrun in this process, its log lines and tracebacks left out; the exit code."""
    die_with_parent()
    for number in STOP_SIGNALS:  # the parent's business
        signal.signal(number, lambda *_: None)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()
    # After a failure torchrun sends the other ranks SIGTERM and, 30 s later, SIGKILL: no option
    # changes that, and our ranks take SIGTERM for a request to stop after the step.
    PContext.close.__defaults__ = (None, GRACE_S)  # death_sig, timeout
    try:
        parsed = run.parse_args(arguments)
        parsed.signals_to_handle = "SIGQUIT"
        run.run(parsed)
    except ChildFailedError as error:
        _set_failed(run_dir)
        print(f"\n{_last_words(run_dir, error.failures)}", file=sys.stderr, flush=True)
        return 1
    return 0


def _last_words(run_dir: Path, failures: dict[int, Any]) -> str:
    """The first failing rank's own account; for one that left none, how its process ended.

    `failures`: torch's ProcessFailure of every rank that did not end with 0, first noticed first.
    """
    record = first_error(run_dir)
    if record is not None and not record["echo"]:
        return account(run_dir, record)
    begin = min(failure.timestamp for failure in failures.values())
    # Later ones were ended by torchrun, and so were those of SIGTERM.
    early = {r: f.exitcode for r, f in failures.items() if f.timestamp < begin + GRACE_S}
    silent = {
        rank: code
        for rank, code in early.items()
        if code != -signal.SIGTERM and not error_file(run_dir, rank).exists()
    }
    if record is not None and not silent:
        return account(run_dir, record)
    rank, code = next(iter((silent or early).items()))
    if code >= 0:
        return f"rank {rank} failed: exit code {code} (what it wrote is above)"
    why = " (often the kernel's out-of-memory killer)" if code == -signal.SIGKILL else ""
    return f"rank {rank} failed: died of signal {-code}{why}; it left no traceback"


def _set_failed(run_dir: Path) -> None:
    """Says so where the run got as far as its folder."""
    if run_dir.is_dir():
        set_status(run_dir, "failed")


if __name__ == "__main__":
    sys.exit(torchrun(Path(sys.argv[1]), sys.argv[2:]))
