"""Real ranks under torchrun: what a run's end looks like, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 90.0  # for a start on a busy machine; what is promised to be quick is measured
PROGRAM = (
    "import sys; from pathlib import Path; "
    "from megatron_sgopd.distributed.torchrun import run_ranks; "
    "from megatron_sgopd.distributed.failure import die_with_parent; die_with_parent(); "
    "run_dir = Path(sys.argv[1]); "
    "sys.exit(run_ranks(int(sys.argv[3]), [str(run_dir), sys.argv[2]], run_dir,"
    " module='tests.support.rank_program'))"
)


@dataclass
class Job:
    """A started `run_ranks` and what is on its screen."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    world_size: int
    screen: bytes = b""
    code: int | None = None
    ended: float = 0.0
    pids: list[int] = field(default_factory=list)

    def wait_for_ranks(self) -> float:
        """Until every rank has passed its first barrier; when the last one did."""
        folder = self.run_dir / "pids"
        wait_until(lambda: len(list(folder.glob("*"))) == self.world_size, "the ranks' start")
        stamps = [(folder / str(rank)).read_text().split() for rank in range(self.world_size)]
        self.pids = [int(pid) for pid, _ in stamps]
        return max(float(at) for _, at in stamps)

    def finish(self) -> float:
        """Reads the screen to its end; seconds from the last rank's start to the parent's end."""
        output, _ = self.process.communicate(timeout=TIMEOUT_S)
        self.ended = time.time()
        self.screen, self.code = output, self.process.returncode
        return self.ended - self.wait_for_ranks()

    @property
    def text(self) -> str:
        return self.screen.decode()

    @property
    def last(self) -> str:
        """The last paragraph on the screen."""
        return self.text.strip().rpartition("\n\n")[2]

    @property
    def status(self) -> str:
        return (self.run_dir / "status").read_text().strip()

    def alive(self) -> list[int]:
        return [pid for pid in self.pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT_S) -> None:
    deadline, pause = time.monotonic() + timeout, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"{what} took longer than {timeout} s"
        pause.wait(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs = []

    def start(behaviour: str, world_size: int = 2) -> Job:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path), behaviour, str(world_size)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        jobs.append(Job(process, tmp_path, world_size))
        return jobs[-1]

    yield start
    for job in jobs:
        job.process.kill()
        job.process.wait(10)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_succeed_end_with_0(start: Callable[..., Job], world_size: int):
    job = start("succeed", world_size)
    job.finish()
    assert job.code == 0, job.text
    assert "\rbar 1/2\rbar 2/2" in job.text, "a progress bar reaches the screen as it is"
    lines = job.text.replace("\rbar 1/2\rbar 2/2", "").splitlines()
    everybody = list(range(world_size))
    assert sorted(lines) == [f"rank {rank} saw {everybody}" for rank in everybody]


@pytest.mark.parametrize("others", ["barrier", "sleep"])
def test_a_failing_rank_brings_all_down_and_has_the_last_word(
    start: Callable[..., Job], others: str
):
    job = start(f"rank 1 raises, others {others}")
    seconds = job.finish()
    assert job.code == 1
    assert seconds < 10.0, f"the ranks came down in {seconds:.1f} s"
    assert job.alive() == []
    record = job.run_dir / "errors" / "rank-00001.json"
    assert job.last == (
        "rank 1 failed: RuntimeError: the loss of rank 1 is not a number\n"
        f"(its traceback is above and in {record})"
    )
    assert "[rank 1] RuntimeError: the loss of rank 1 is not a number\n" in job.text
    assert not re.search(r"\[rank 0\]|elastic|ChildFailedError", job.text), job.text
    assert ("rank 0: stopping because rank 1 failed first" in job.text) == (others == "barrier")
    assert job.status == "failed"


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("killed, others barrier", "rank 1 failed: died of signal 9 (often the kernel's out-of-"),
        ("leaves, others sleep", "rank 1 failed: exit code 3 (what it wrote is above)"),
    ],
)
def test_a_rank_that_left_no_record_is_named(start: Callable[..., Job], behaviour: str, words: str):
    job = start(behaviour)
    seconds = job.finish()
    assert job.code == 1
    assert seconds < 10.0, f"the ranks came down in {seconds:.1f} s"
    assert job.last.startswith(words), job.text
    assert job.alive() == []
    assert job.status == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_the_ranks_to_stop(start: Callable[..., Job], number: int):
    job = start("work until STOP")
    job.wait_for_ranks()
    os.kill(job.process.pid, number)
    job.finish()
    assert job.code == 0, job.text
    assert (job.run_dir / "STOP").exists()
    for rank in (0, 1):
        assert f"rank {rank} stopped on request\n" in job.text
    assert "stopping after this step, with a checkpoint; Ctrl-C again to kill" in job.text


def test_a_second_interrupt_kills(start: Callable[..., Job]):
    job = start("ignore STOP")
    job.wait_for_ranks()
    os.kill(job.process.pid, signal.SIGINT)
    wait_until((job.run_dir / "STOP").exists, "STOP")
    os.kill(job.process.pid, signal.SIGINT)
    began = time.time()
    job.finish()
    wait_until(lambda: not job.alive(), "the ranks' end", 5.0)
    assert job.code == 1
    assert job.ended - began < 5.0
    assert job.last == "the run was killed (signal 9)"
    assert job.status == "failed"
    assert not list((job.run_dir / "tmp").glob("sgopd-torchrun-*")), "no folder is left"


def test_no_rank_outlives_a_killed_parent(start: Callable[..., Job]):
    job = start("ignore STOP")
    job.wait_for_ranks()
    assert len(job.alive()) == 2
    job.process.kill()
    wait_until(lambda: not job.alive(), "the ranks' end", 5.0)
