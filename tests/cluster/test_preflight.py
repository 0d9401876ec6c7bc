"""A job's first seconds: what is wrong, and on which node."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cluster.conftest import Tiny
from tests.cluster.jobs import RECIPE, SCRIPT, Cluster
from tests.cluster.mini_slurm import find

# Stands for the python of an environment; on some nodes with a fault of its own.
PYTHON = """\
#!/bin/bash
case $(hostname) in
    node3) [[ $* == *preflight* ]] && exec {python} -c "
import runpy, sys, time
now = time.time
time.time = lambda: now() + 3600
sys.argv[1:] = sys.argv[3:]
runpy.run_module('megatron_sgopd', run_name='__main__')" "$@" ;;
    node4) echo "$0: cannot execute: required file not found" >&2; exit 127 ;;
    node7) [[ $* == *preflight* ]] && sleep 600 ;;
esac
exec {python} "$@"
"""
NVIDIA_SMI = """\
#!/bin/bash
[[ $(hostname) == node5 ]] && count=7 || count=8
for ((i = 0; i < count; i++)); do echo "GPU $i: NVIDIA H100 (UUID: GPU-$i)"; done
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def in_node(cluster: Cluster, name: str, *command: str) -> subprocess.Popen[bytes]:
    """Runs in a node's namespaces."""
    pidfile = cluster.base / "run" / f"slurmd.{name}.pid"
    enter = [find("nsenter") or "nsenter", "--target", pidfile.read_text().strip()]
    return subprocess.Popen([*enter, "--net", "--mount", "--uts", *command])


def test_every_bad_node_is_named_with_its_fault(cluster: Cluster, tiny: Tiny, shared: Path) -> None:
    run_dir = shared / "runs" / "preflight"
    run_dir.mkdir(parents=True)
    python = program(shared / "bin" / "python", PYTHON.format(python=sys.executable))
    program(shared / "bin" / "nvidia-smi", NVIDIA_SMI)
    listen = "import socket, time; s = socket.create_server(('', {port})); time.sleep(600)"
    # As on a node where the shared file system is not mounted.
    mounted = in_node(cluster, "node2", "mount", "-t", "tmpfs", "none", str(run_dir))
    assert mounted.wait(10) == 0
    job = cluster.submit(
        RECIPE,
        *tiny.settings(run_dir, "parallel.data_parallel_size=32", "rollout.num_prompts=32"),
        options=["--nodes=8", "--gpus-per-node=8", "--hold"],
        variables={
            "SGOPD_DEVICE": "cuda",
            "SGOPD_PYTHON": str(python),
            "SGOPD_PREFLIGHT_S": "20",
            "PATH": f"{shared}/bin:{cluster.environment['PATH']}",
        },
    )
    port = 20000 + 32 * (job.id % 398)  # what follows from its number
    squatter = in_node(cluster, "node1", sys.executable, "-c", listen.format(port=port))
    try:
        cluster.call("scontrol", "release", str(job.id))
        assert (job.end(), job.exit_code) == ("FAILED", 1)
    finally:
        squatter.kill()
        squatter.wait()
        assert in_node(cluster, "node2", "umount", str(run_dir)).wait(10) == 0
    said = {
        line.split("preflight: ")[1].split(": ")[0]: line
        for line in job.text.splitlines()
        if "preflight: node" in line
    }
    assert sorted(said) == ["node1", "node2", "node3", "node4", "node5", "node7"], job.text
    assert f"port {port} is taken" in said["node1"]
    assert f"the run directory {run_dir} is not the first node's" in said["node2"]
    assert "its clock is 36" in said["node3"]
    assert "the python environment: " in said["node4"] and "exit code 127" in said["node4"]
    assert "7 GPUs (nvidia-smi -L), 8 wanted" in said["node5"]
    assert "no answer within" in said["node7"]
    assert "submit with --exclude=NODE" in job.text
    assert job.restarts == 0


def test_a_plain_sbatch_says_what_it_misses(cluster: Cluster) -> None:
    """As users type it: no argument, no setting; here are no GPUs and no models."""
    plain = {k: v for k, v in cluster.environment.items() if not k.startswith("SGOPD_")}
    output = cluster.base / "log" / "plain.out"
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={output}", SCRIPT],
        env={**plain, "SGOPD_PYTHON": sys.executable},
        cwd=Path(__file__).resolve().parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, output.read_text()
    text = output.read_text()
    assert "4 nodes train, 4 serve; 8 processes a node" in text
    for i in range(1, 9):
        assert f"preflight: node{i}: no GPUs (there is no nvidia-smi), 8 wanted" in text


def test_more_nodes_than_there_are_is_said_by_sbatch(cluster: Cluster) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", "--nodes=9", SCRIPT],
        env=cluster.environment,
        cwd=Path(__file__).resolve().parent.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Node count specification invalid" in done.stderr
