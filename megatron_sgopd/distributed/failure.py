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

PR_SET_PDEATHSIG = 1  # of Linux's prctl
SETTLE_S = 1.0  # a peer's connection may close before the first rank's record is on disk


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Asks the kernel to send this process a signal when its parent ends, be it by SIGKILL.

    Only Linux can; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


@contextmanager
def failing_together(run_dir: Path, rank: int) -> Iterator[None]:
    """Around everything a rank does; on an exception the process ends with exit code 1."""
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
    (run_dir / "status").write_text("failed\n", encoding="utf-8")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)


def _is_echo(error: BaseException) -> bool:
    """Whether the error looks like a peer's end rather than a fault of this rank's own."""
    text = f"{type(error).__name__} {error}".lower()
    marks = (
        "connection closed",
        "connection reset",
        "gloo",
        "nccl",
        "connection refused",
        "broken",
    )
    return isinstance(error, KeyboardInterrupt) or any(mark in text for mark in marks)


def error_file(run_dir: Path, rank: int) -> Path:
    return run_dir / "errors" / f"rank-{rank:05d}.json"


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
    path = error_file(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)
    return record


def first_error(run_dir: Path) -> dict[str, Any] | None:
    """The earliest record that is no echo of another; the earliest of all where all are."""
    records = []
    for path in (run_dir / "errors").glob("rank-*.json"):
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return min(records, key=lambda r: (r["echo"], r["time"]), default=None)


def account(run_dir: Path, record: dict[str, Any]) -> str:
    """What to print last after a failure."""
    return (
        f"rank {record['rank']} failed: {record['type']}: {record['message']}\n"
        f"(its traceback is above and in {error_file(run_dir, record['rank'])})"
    )
