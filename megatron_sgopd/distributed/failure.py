"""Several ranks fail together, quickly, and the first one's error is what a person reads.

A failing rank writes RUN_DIR/errors/rank-00000.json before anything else, prints its traceback
unless another rank failed earlier, and leaves at once: no destructor of its may wait in a
collective. Its peers' connections close, so their collectives raise and they come down the same
way. Whoever started the ranks prints the earliest record last (`first_error`, `account`).
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import write_json
from megatron_sgopd.run_folder import ERRORS, set_status

PR_SET_PDEATHSIG = 1  # of Linux's prctl
_ECHOES = (
    "gloo/transport",
    "connection closed by peer",
    "connection reset by peer",
    "nccl error",
    "nccl communicator",
)
SETTLE_S = 1.0  # a peer's connection may close before the first rank's record is on disk


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when its parent ends, be it by SIGKILL.

    Only Linux can; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def failing_together(run_dir: Path, rank: int) -> Iterator[None]:
    """Runs everything that a rank does; an exception ends the process with exit code 1."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (0, None):
            raise
        _leave(run_dir, rank, error)


def _leave(run_dir: Path, rank: int, error: BaseException) -> None:
    own = record_error(run_dir, rank, error)
    if _is_echo(error):
        time.sleep(SETTLE_S)
    first = first_error(run_dir)
    if first is not None and first["rank"] != rank:
        print(f"rank {rank}: stopping because rank {first['rank']} failed first", file=sys.stderr)
    else:
        text = "".join(f"[rank {rank}] {line}\n" for line in own["traceback"].splitlines())
        sys.stderr.write(text)
    set_status(run_dir, "failed")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _is_echo(error: BaseException) -> bool:
    """Tells whether an error is a peer's end as a collective reports it, not this rank's own fault.

    Decided by type, since an error of this package may quote a peer's words ("Connection refused"):
    torch.distributed has its own types; gloo and NCCL also raise plain RuntimeErrors.
    """
    kind = type(error)
    if kind.__module__.startswith("torch."):
        return kind.__name__.startswith("Dist")
    text = str(error).lower()
    return kind is KeyboardInterrupt or (kind is RuntimeError and any(m in text for m in _ECHOES))


def error_file(run_dir: Path, rank: int) -> Path:
    return run_dir / ERRORS / f"rank-{rank:05d}.json"


def record_error(run_dir: Path, rank: int, error: BaseException) -> dict[str, Any]:
    """Writes RUN_DIR/errors/rank-00000.json, whole or not at all."""
    record = {
        "rank": rank,
        "time": time.time(),
        "echo": _is_echo(error),
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    write_json(error_file(run_dir, rank), record)
    return record


def first_error(run_dir: Path) -> dict[str, Any] | None:
    """The earliest record that is no echo of another; the earliest of all where all are."""
    records = []
    for path in (run_dir / ERRORS).glob("rank-*.json"):
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return min(records, key=lambda r: (r["echo"], r["time"]), default=None)


def account(run_dir: Path, record: dict[str, Any]) -> str:
    """Returns what to print last after a failure."""
    return (
        f"rank {record['rank']} failed: {record['type']}: {record['message']}\n"
        f"(its traceback is above and in {error_file(run_dir, record['rank'])})"
    )
