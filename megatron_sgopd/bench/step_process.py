"""A command run to its end, and the memory that its processes held. Imports no torch."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import psutil

EVERY_S = 0.25  # between two looks at the processes


@dataclass(frozen=True)
class Ended:
    """`largest_mb`: the peak of the process that held most; `all_mb`: of all at one moment."""

    exit_code: int
    largest_mb: float
    all_mb: float


def run_watched(command: Sequence[str], environment: dict[str, str], output: IO[str]) -> Ended:
    """Runs the command with its output in a file; ends it when this process is interrupted."""
    largest = together = 0
    with subprocess.Popen(
        command, env=environment, stdout=output, stderr=subprocess.STDOUT
    ) as process:
        root = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                now = _resident(root)
                largest, together = max(largest, *now), max(together, sum(now))
                time.sleep(EVERY_S)
        except BaseException:
            for one in _family(root):
                one.kill()
            raise
    return Ended(process.returncode, largest / 2**20, together / 2**20)


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(root: psutil.Process) -> list[int]:
    """Bytes of each process; those that have just ended count 0."""
    sizes = [0]
    for process in _family(root):
        try:
            sizes.append(process.memory_info().rss)
        except psutil.NoSuchProcess:
            sizes.append(0)
    return sizes
