"""`sgopd bench kl`: starts a worker for each allocator setting and collects what they find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.bench.cases import Case, Shape, cases
from megatron_sgopd.bench.job import Job
from megatron_sgopd.bench.table import case_table
from megatron_sgopd.config.errors import ConfigError

# Variables of glibc, which reads them when a process starts. `default` is what a user gets: every
# tensor above 32 MiB is mapped anew and its pages are faulted in. `reuse` keeps freed memory, as
# the caching allocator of a GPU does.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "reuse": {
        "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    },
}
ROUNDS, BUDGET_S = 9, 5.0
SMALL_ROUNDS = 3

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Describes what the command line says."""

    json: Path | None = None
    small: bool = False
    rounds: int | None = None  # None: `ROUNDS`, fewer where they take long
    only: str = ""
    allocator: str = "both"
    device: str = "cpu"
    shapes: Sequence[Shape] = ()


def run_kl(options: Options) -> int:
    """Return exit code 0: measured; 1: a variant of ours has failed, or a whole worker.

    Raises:
        ConfigError: options that leave nothing to measure, or a file that cannot be written.
    """
    start = time.monotonic()
    try:
        chosen = cases(
            small=options.small, device=options.device, shapes=options.shapes, only=options.only
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows: list[Row] = []
    _write(options.json, rows)  # whether it can be is known now, not after the measurement
    failures: dict[str, str] = {}
    names = _allocators(options)
    for name in names:
        is_last = name == names[-1]
        # Large products of matrices take longest, and leave the allocator least to decide.
        own = [case for case in chosen if is_last or not (case.form == "fused" and case.is_large)]
        for found in _worker(_job(own, options, name, with_error=is_last)) if own else ():
            if "case" in found:
                seconds = time.monotonic() - start
                print(f"{seconds:.0f} s, {name}: {found['case']}", file=sys.stderr, flush=True)
                rows += found["rows"]
                _write(options.json, rows)
                failures |= {f"{found['case']}, {k}": v for k, v in found["failed"].items()}
            elif name == names[0]:
                _tell(found)
    _share_errors(rows)
    for case in chosen:
        print(case_table(case, rows))
    for what, reason in failures.items():
        print(f"failed: {what}: {reason.splitlines()[-1]}")
    print(f"{len(rows)} rows in {time.monotonic() - start:.0f} s")
    _write(options.json, rows)
    return int(any(", ours" in what or ", all" in what for what in failures))


def _allocators(options: Options) -> list[str]:
    if options.device == "cuda":
        return ["default"]  # PyTorch's caching allocator; glibc's has no part in it
    return list(ALLOCATORS) if options.allocator == "both" else [options.allocator]


def _job(chosen: list[Case], options: Options, allocator: str, *, with_error: bool) -> Job:
    rounds = options.rounds or (SMALL_ROUNDS if options.small else ROUNDS)
    budget_s = BUDGET_S if options.rounds is None else float("inf")
    return Job(chosen, options.device, allocator, rounds, budget_s, with_error)


def _worker(job: Job) -> Iterator[dict[str, Any]]:
    """Yield what a worker finds, as it finds it."""
    read, write = os.pipe()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= ALLOCATORS[job.allocator] | {
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compilers would be forked with the rest
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "megatron_sgopd.bench.worker", str(write)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment, pass_fds=[write]
    ) as worker:
        os.close(write)
        assert worker.stdin is not None, "a pipe was asked for"
        worker.stdin.write(job.to_json().encode())
        worker.stdin.close()
        with os.fdopen(read, encoding="utf-8") as results:
            for line in results:
                found = json.loads(line)
                if "refused" in found:
                    raise ConfigError(found["refused"])
                yield found
    if worker.returncode:
        raise WorkerFailed(
            f"the worker of allocator {job.allocator!r} ended with exit code {worker.returncode}; "
            "what it printed is above"
        )


class WorkerFailed(RuntimeError):
    """A worker ended before it had measured everything."""


def _tell(found: dict[str, Any]) -> None:
    """Print what a worker says before its first case."""
    if "rates" in found:
        print(f"this machine: {found['line']}\n")
        return
    for name, reason in found["missing"].items():
        print(f"left out: {name}: {reason}")
    if found["missing"]:
        print("the baselines' environment is made by: make bench-env")


def _share_errors(rows: list[Row]) -> None:
    """Give every allocator's rows the gradient's error, measured under the last."""

    parts = ("name", "form", "objective", "tokens", "vocab", "tp", "dtype")

    def key(row: Row) -> tuple[object, ...]:
        return tuple(row[part] for part in parts)

    known = {key(row): row["gradient_rel_error"] for row in rows if row["gradient_rel_error"]}
    for row in rows:
        row["gradient_rel_error"] = known.get(key(row))


def _write(path: Path | None, rows: list[Row]) -> None:
    if path is None:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror})") from error
