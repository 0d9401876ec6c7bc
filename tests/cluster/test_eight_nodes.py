"""The script as it is meant, on all eight nodes; and the loss of the node that holds the job."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster.conftest import Tiny
from tests.cluster.jobs import RECIPE, Cluster, steps

pytestmark = pytest.mark.skipif(not os.environ.get("LONG"), reason="make test-cluster LONG=1")


def test_eight_nodes_train_with_tp_2_pp_2_dp_2(cluster: Cluster, tiny: Tiny, shared: Path) -> None:
    run_dir = shared / "runs" / "eight"
    layout = ("pipeline_model_parallel_size=2", "data_parallel_size=2")
    settings = tiny.settings(run_dir, "num_steps=4", *(f"parallel.{each}" for each in layout))
    job = cluster.submit(RECIPE, *settings)  # 8 nodes are the script's own
    assert job.end(300.0) == "COMPLETED", job.everything()
    assert job.exit_code == 0
    assert "8 nodes train, 0 serve; 1 processes a node" in job.text
    assert "preflight: all 8 nodes are well" in job.text
    assert steps(run_dir) == [1, 2, 3, 4]
    logs = {path.name for path in (run_dir / "logs").glob("*/*")}
    assert logs == {"guard-node8.log", *(f"trainer-node{i}.log" for i in range(1, 9))}
    assert (run_dir / "hf" / "model.safetensors").is_file()


def test_the_loss_of_the_first_node(cluster: Cluster, tiny: Tiny, shared: Path) -> None:
    """The batch script goes with it: another node requeues the job."""
    run_dir = shared / "runs" / "first-lost"
    settings = tiny.settings(
        run_dir, "num_steps=16", "checkpoint.every=2", "checkpoint.save_hf=false"
    )
    job = cluster.submit(RECIPE, *settings, options=["--nodes=2"])
    job.until(lambda: len(steps(run_dir)) >= 4, "step 4")
    lost = job.nodes()[0]
    with cluster.lost(lost):
        job.rerun(1)
        assert job.end() == "COMPLETED", job.everything()
        assert "resumed at step" in job.everything()
    assert steps(run_dir) == list(range(1, 17))
