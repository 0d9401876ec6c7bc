"""A cluster and its jobs as a user meets them: sbatch, scancel, and what scontrol says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import read_json_lines
from tests.cluster.mini_slurm import Node, namespace_pids, set_link

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "slurm/sgopd_8node.sh"
RECIPE = "recipes/demo/sg_opd.yaml"
PATIENCE_S = 150.0
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.2)
    return value


@dataclass
class Job:
    cluster: Cluster
    id: int
    output: Path

    def info(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.cluster.call("scontrol", "--oneliner", "show", "job", str(self.id))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def state(self) -> str:
        return self.info()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.info()["Restarts"])

    @property
    def exit_code(self) -> int:
        return int(self.info()["ExitCode"].split(":")[0])

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def until(self, true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
        """Fails at once when the job ends before."""

        def holds() -> Any:
            value = true()
            if not value and self.state in ENDED:
                value = true()  # it may have come true with the end
                assert value, f"{what}: the job ended"
            return value

        try:
            return until(holds, what, patience_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.everything()}") from None

    def end(self, patience_s: float = PATIENCE_S) -> str:
        """Its state when it has ended."""

        def ended() -> str | None:
            state = self.state
            return state if state in ENDED else None

        return str(self.until(ended, "the job's end", patience_s))

    def rerun(self, restarts: int, patience_s: float = PATIENCE_S) -> None:
        """Waits until it is in the queue for the so manieth time, and starts it at once.

        Slurm would let a requeued job wait for two minutes.
        """

        def waiting() -> bool:
            info = self.info()
            return info["JobState"] == "PENDING" and int(info["Restarts"]) == restarts

        self.until(waiting, f"requeue {restarts}", patience_s)
        self.cluster.call("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def signal(self, name: str) -> None:
        """To the batch shell, as Slurm does before the time limit."""
        self.cluster.call("scancel", "--batch", f"--signal={name}", str(self.id))

    def cancel(self) -> None:
        self.cluster.call("scancel", str(self.id))

    def nodes(self) -> list[str]:
        expanded = self.cluster.call("scontrol", "show", "hostnames", self.info()["NodeList"])
        return expanded.split()

    def processes(self, wanted: str = "") -> list[int]:
        """Of this job's on all nodes, those whose command line has a word."""
        found = []
        for pid in self.cluster.pids():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                variables = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
            except OSError:  # it ended meanwhile
                continue
            if wanted in line and f"SLURM_JOB_ID={self.id}" in variables:
                found.append(pid)
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid in self.processes("megatron_sgopd train"):
            if f"\0RANK={number}\0" in Path(f"/proc/{pid}/environ").read_text(errors="replace"):
                return pid
        raise AssertionError(f"no rank {number}\n{self.everything()}")

    def everything(self) -> str:
        """The job's log and the ends of its steps', for a failing test."""
        found = re.findall(r"logs in (\S+)", self.text)
        logs = [path for folder in dict.fromkeys(found) for path in sorted(Path(folder).glob("*"))]
        ends = [f"--- {p.name}\n" + "\n".join(p.read_text().splitlines()[-40:]) for p in logs]
        return "\n".join([str(self.info()), self.text, *ends])


@dataclass
class Cluster:
    base: Path
    nodes: list[Node]
    environment: dict[str, str]
    keeper: subprocess.Popen[str]
    jobs: list[Job] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls, shared: Path, num_nodes: int, network: int = 0) -> Iterator[Cluster]:
        base = shared / f"slurm{network}"
        base.mkdir()
        keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.mini_slurm", base, str(num_nodes), str(network)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C is not for it: it tidies up afterwards
        )
        assert keeper.stdin is not None and keeper.stdout is not None, "pipes"
        try:
            assert keeper.stdout.readline() == "ready\n", "the cluster's own words are above"
            yield cls(
                base,
                [Node(i, network) for i in range(1, num_nodes + 1)],
                {
                    **_outside_of_slurm(),
                    "SLURM_CONF": str(base / "etc" / "slurm.conf"),
                    "SGOPD_DEVICE": "cpu",
                    "SGOPD_PYTHON": sys.executable,
                    "OMP_NUM_THREADS": "1",
                },
                keeper,
            )
        finally:
            keeper.stdin.close()
            keeper.wait(60)

    def call(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def submit(
        self,
        *arguments: str,
        options: Sequence[str] = (),
        script: str = SCRIPT,
        variables: Mapping[str, str] | None = None,
    ) -> Job:
        """sbatch OPTIONS SCRIPT ARGUMENTS, from the project's folder; one process a node."""
        output = self.base / "log" / "job-%j.out"
        command = ["sbatch", "--parsable", f"--output={output}", "--gpus-per-node=1", *options]
        told = self.call(*command, *filter(None, [script]), *arguments, **dict(variables or {}))
        number = int(told.split(";")[0])
        self.jobs.append(Job(self, number, Path(str(output).replace("%j", str(number)))))
        return self.jobs[-1]

    def pids(self) -> list[int]:
        return [pid for node in self.nodes for pid in namespace_pids(node)]

    def node(self, name: str) -> Node:
        (found,) = [node for node in self.nodes if node.name == name]
        return found

    @contextmanager
    def lost(self, name: str) -> Iterator[None]:
        """A node whose cable is pulled; back, and idle again, afterwards."""
        set_link(self.node(name), up=False)
        try:
            yield
        finally:
            set_link(self.node(name), up=True)
            until(lambda: self._resumed(name), f"{name} is back")

    def _resumed(self, name: str) -> bool:
        if "DOWN" not in self.call("scontrol", "--oneliner", "show", "node", name):
            return True
        self.call("scontrol", "update", f"NodeName={name}", "State=RESUME")
        return False


def _outside_of_slurm() -> dict[str, str]:
    names = ("SLURM", "SBATCH", "SGOPD")
    return {key: value for key, value in os.environ.items() if not key.startswith(names)}


def steps(run_dir: Path) -> list[int]:
    """Those in metrics.jsonl, in its order."""
    return [row["step"] for row in list(read_json_lines(run_dir / "metrics.jsonl"))]
