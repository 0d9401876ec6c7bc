"""`sbatch slurm/sgopd_8node.sh`: whatever befalls a run, each of its steps is done once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.atomic_files import read_json_lines
from tests.cluster.conftest import Tiny
from tests.cluster.jobs import RECIPE, Cluster, steps, until

STEPS = 24
SETTINGS = (f"num_steps={STEPS}", "checkpoint.every=4", "checkpoint.save_hf=false")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    found = list(read_json_lines(run_dir / "metrics.jsonl"))
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in found]


def status(run_dir: Path) -> str:
    return (run_dir / "status").read_text().strip()


def done(run_dir: Path, count: int) -> bool:
    return len(steps(run_dir)) >= count


@pytest.fixture(scope="module")
def plain(cluster: Cluster, tiny: Tiny, shared: Path) -> Path:
    """TP 2 over two nodes, undisturbed."""
    run_dir = shared / "runs" / "plain"
    job = cluster.submit(RECIPE, *tiny.settings(run_dir, *SETTINGS), options=["--nodes=2"])
    assert job.end() == "COMPLETED", job.everything()
    assert job.exit_code == 0
    assert "preflight: all 2 nodes are well" in job.text
    assert f"finished: {run_dir}/summary.json" in job.text
    return run_dir


def test_two_nodes_train_with_tensor_parallel_2(plain: Path, cluster: Cluster) -> None:
    assert steps(plain) == list(range(1, STEPS + 1))
    assert status(plain) == "finished"
    (logs,) = (plain / "logs").iterdir()
    names = [path.name.split("-node") for path in sorted(logs.iterdir())]
    (guard, on), (trainer, _), (other, last) = names
    assert (guard, trainer, other) == ("guard", "trainer", "trainer"), names
    assert on == last, "the guard is on the last node"
    assert not (plain / ".preflight").exists() and not list(plain.glob(".preflight-*"))


def test_a_finished_run_is_not_trained_again(plain: Path, tiny: Tiny, cluster: Cluster) -> None:
    before = (plain / "metrics.jsonl").stat().st_mtime_ns
    job = cluster.submit(RECIPE, *tiny.settings(plain, *SETTINGS), options=["--nodes=2"])
    assert (job.end(), job.exit_code) == ("COMPLETED", 0)
    assert "holds this very run, finished: nothing to do" in job.text
    assert (plain / "metrics.jsonl").stat().st_mtime_ns == before


def test_time_limit_dead_rank_lost_node_and_scancel(
    plain: Path, cluster: Cluster, tiny: Tiny, shared: Path
) -> None:
    """One run meets them all, and its metrics are those of the undisturbed one."""
    run_dir = shared / "runs" / "disturbed"
    arguments = (RECIPE, *tiny.settings(run_dir, *SETTINGS))
    job = cluster.submit(*arguments, options=["--nodes=2"])

    job.until(lambda: done(run_dir, 2), "step 2")
    job.signal("USR1")  # what Slurm sends before the time limit
    job.rerun(1)
    stopped_at = len(steps(run_dir))
    assert "requeue (time limit; 0 of 3 without progress)" in job.text
    assert (run_dir / "checkpoints" / f"step-{stopped_at:08d}").is_dir()

    job.until(lambda: done(run_dir, 9), "step 9")
    os.kill(job.rank(1), signal.SIGKILL)  # as the out-of-memory killer does
    job.rerun(2)
    assert "requeue (failure; 1 of 3 without progress), from step-0000000" in job.text

    job.until(lambda: done(run_dir, 14), "step 14")
    lost = job.nodes()[1]
    with cluster.lost(lost):
        job.rerun(3)
        assert f"Node failure on {lost}" in job.text
        assert "requeue (failure; 1 of 3 without progress), from step-000000" in job.text
        job.until(lambda: len(job.text.split("restart 3:")) == 2, "another start")
        assert lost not in job.nodes(), "the run goes on elsewhere"
        job.until(lambda: done(run_dir, 17), "step 17")
        job.cancel()
        assert job.end() == "CANCELLED"
    assert status(run_dir) == "stopped"
    until(lambda: "the same sbatch resumes it" in job.text, "the last words", 10)
    assert f"cancelled at step-{len(steps(run_dir)):08d}" in job.text
    assert job.restarts == 3, "scancel is no requeue"

    again = cluster.submit(*arguments, options=["--nodes=2"])
    assert (again.end(), again.exit_code) == ("COMPLETED", 0), again.everything()
    assert steps(run_dir) == list(range(1, STEPS + 1)), "none twice, none left out"
    assert rows(run_dir) == rows(plain), "to the last digit"
    assert not (run_dir / "requeues").exists()


def test_a_failure_that_comes_back_ends_the_job(cluster: Cluster, tiny: Tiny, shared: Path) -> None:
    run_dir = shared / "runs" / "failing"
    settings = tiny.settings(run_dir, "data.train=/nowhere.jsonl")
    job = cluster.submit(
        RECIPE, *settings, options=["--nodes=2"], variables={"SGOPD_MAX_REQUEUES": "1"}
    )
    job.rerun(1)
    assert (job.end(), job.exit_code) == ("FAILED", 1)
    assert "failed: ValueError: /nowhere.jsonl" in job.text, job.everything()
    assert "giving up (failure): requeue 2 without a new checkpoint" in job.text


def test_a_recipe_that_cannot_be_is_said_at_once(cluster: Cluster, shared: Path) -> None:
    job = cluster.submit(RECIPE, "parallel.tensor_model_parallel_size=3", options=["--nodes=2"])
    assert (job.end(), job.exit_code) == ("FAILED", 2)
    assert "2 processes cannot be TP 3 x PP 1 x CP 1 x DP 1 = 3" in job.text
    assert job.restarts == 0
