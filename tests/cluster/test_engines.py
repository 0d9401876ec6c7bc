"""Trainers on some nodes, real vLLM servers on another: they end, are lost, and come again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_sgopd.atomic_files import read_json_lines
from tests.cluster.conftest import Tiny
from tests.cluster.jobs import RECIPE, Cluster, Job, steps, until

STEPS = 10
PATIENCE_S = 240.0  # vLLM takes its time to start on two cores


def settings(tiny: Tiny, run_dir: Path) -> list[str]:
    return tiny.settings(
        run_dir,
        f"num_steps={STEPS}",
        "checkpoint.every=0",  # none but those that somebody asks for
        "checkpoint.save_hf=false",
        "distill.phases.enabled=false",
        "rollout.engine=vllm",
        "rollout.vllm.nodes=1",
        "rollout.vllm.health_timeout_s=40",
        "rollout.vllm.max_restarts=1",
    )


def kill_server(job: Job) -> None:
    """The server and its engine core, as the out-of-memory killer would."""
    servers = job.processes("vllm.entrypoints.openai.api_server")
    servers = [pid for pid in servers if "vllm_servers.supervisor" not in line_of(pid)]
    assert len(servers) == 1, job.everything()
    os.kill(servers[0], signal.SIGKILL)


def line_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_a_server_on_a_node_of_its_own_dies_and_is_started_again(
    cluster: Cluster, tiny: Tiny, shared: Path
) -> None:
    run_dir = shared / "runs" / "split"
    job = cluster.submit(RECIPE, *settings(tiny, run_dir), options=["--nodes=3"])
    job.until(lambda: len(steps(run_dir)) >= 3, "step 3", PATIENCE_S)
    names = job.nodes()
    assert "2 nodes train, 1 serve" in job.text
    assert f"the student's servers are ready: http://{names[2]}:" in job.text
    kill_server(job)
    assert job.end(PATIENCE_S) == "COMPLETED", job.everything()
    assert job.exit_code == 0
    rows = list(read_json_lines(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["engine/restarts"] for row in rows][:3] == [0, 0, 0]
    assert rows[-1]["engine/restarts"] == 1
    assert all(row["engine/probe_mismatch_kl"] < 1e-9 for row in rows)
    logs = sorted(path.name for path in (run_dir / "logs").glob("*/*"))
    wanted = [f"guard-{names[2]}.log", f"student-engine-{names[2]}.log"]
    wanted += [f"trainer-{name}.log" for name in names[:2]]
    assert logs == wanted
    until(lambda: not job.processes(), "nothing is left on the nodes", 20)


@pytest.mark.skipif(not os.environ.get("LONG"), reason="make test-cluster LONG=1")
def test_a_lost_engine_node_costs_no_step(cluster: Cluster, tiny: Tiny, shared: Path) -> None:
    run_dir = shared / "runs" / "engine-lost"
    job = cluster.submit(RECIPE, *settings(tiny, run_dir), options=["--nodes=3"])
    job.until(lambda: len(steps(run_dir)) >= 3, "step 3", PATIENCE_S)
    lost = job.nodes()[2]
    with cluster.lost(lost):
        job.rerun(1, PATIENCE_S)
        before = len(steps(run_dir))
        assert f"Node failure on {lost}" in job.text
        assert "an engine's step has ended" in job.text
        assert f"requeue (engines lost; 1 of 3 without progress), from step-{before:08d}" in (
            job.text
        ), "what was trained was saved, though no checkpoint was due"
        assert job.end(PATIENCE_S) == "COMPLETED", job.everything()
    assert lost not in job.text.split("restart 1:")[1].split("servers are ready:")[1].split("\n")[0]
    assert steps(run_dir) == list(range(1, STEPS + 1))
