"""The cluster itself: it leaves the machine as it found it, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.cluster.jobs import ROOT, Cluster, until

HOLDER = """\
import json, sys, time
from pathlib import Path
from tests.cluster.jobs import Cluster
with Cluster.started(Path(sys.argv[1]), num_nodes=2, network=2) as cluster:
    job = cluster.submit(options=["--wrap=sleep 600"], script="")
    job.until(lambda: job.state == "RUNNING" and job.processes(), "the job runs")
    print(json.dumps(job.processes()), flush=True)
    time.sleep(600)
"""


def traces(folder: Path) -> dict[str, object]:
    """What a cluster could leave: processes, network namespaces, links, mounts, lines of hosts."""
    processes = set()
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            environment = " ".join(process.environ().values())
        except psutil.Error:
            continue
        zombie = process.status() == psutil.STATUS_ZOMBIE
        if not zombie and str(folder) in " ".join([*(process.info["cmdline"] or []), environment]):
            processes.add(process.info["pid"])
    return {
        "processes": processes,
        "namespaces": entries("/run/netns"),
        "links": entries("/sys/class/net"),
        "mounts": sorted(
            line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line
        ),
        "hosts": Path("/etc/hosts").read_text(),
    }


def entries(folder: str) -> set[str]:
    """Without those of the session's cluster, which may run beside."""
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {path.name for path in found if not path.name.startswith("sgopd0")}


def test_it_starts_and_leaves_nothing_behind(installed: None, shared: Path) -> None:
    before = traces(shared / "slurm1")
    assert before["processes"] == set()
    with Cluster.started(shared, num_nodes=2, network=1) as cluster:
        during = traces(cluster.base)
        assert len(during["processes"]) >= 5, "the keeper, munged, slurmctld, two slurmds"
        assert {"sgopd1-node1", "sgopd1-node2"} <= during["namespaces"]
        assert {"sgopd1br", "sgopd1n1", "sgopd1n2"} <= during["links"]
        job = cluster.submit(options=["--wrap=hostname; sleep 600", "--nodes=2"], script="")
        job.until(lambda: "node1" in job.text, "the job runs on a node with a name of its own")
    assert cluster.keeper.returncode == 0
    assert traces(cluster.base) == before


def test_a_killed_test_leaves_nothing_behind(installed: None, shared: Path) -> None:
    before = traces(shared / "slurm2")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(shared)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None, "a pipe"
    jobs = json.loads(holder.stdout.readline())
    assert len(traces(shared / "slurm2")["processes"]) >= 6
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    until(lambda: traces(shared / "slurm2") == before, "all is gone", 60)
    assert not [pid for pid in jobs if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
