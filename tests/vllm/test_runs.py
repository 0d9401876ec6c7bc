"""Whole runs as a user starts them, on real vLLM servers that are killed or stopped midway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.rollouts.vllm_servers.server import free_ports
from tests.support.documents import check_run_folder
from tests.support.train_cases import metrics_without_time

PATIENCE_S = 200.0


def start(
    world: Path, run_dir: Path, *more: str, command: str = "train"
) -> subprocess.Popen[bytes]:
    """`sgopd train` (or `serve`) of a tiny SG-OPD run; its output goes to RUN_DIR.out."""
    settings = [
        f"model.student.hf_path={world}/student/hf",
        f"model.teacher.hf_path={world}/teacher/hf",
        f"data.train={world}/train.jsonl",
        f"evaluation.during_data={world}/dev.jsonl",
        "evaluation.data=null",
        "evaluation.during_k=1",
        "evaluation.every=2",
        "rollout.engine=vllm",
        "rollout.num_prompts=4",
        "rollout.n=2",
        "rollout.max_new_tokens=12",
        "optimizer.lr_warmup_steps=0",
        f"logging.run_dir={run_dir}",
        "logging.progress=false",
        *more,
    ]
    sgopd = [sys.executable, "-m", "megatron_sgopd", command, "recipes/demo/sg_opd.yaml"]
    with open(f"{run_dir}.out", "ab") as out:
        return subprocess.Popen([*sgopd, *settings], stdout=out, stderr=subprocess.STDOUT)


def servers(model: Path) -> list[psutil.Process]:
    """The API servers of a model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        between = (
            "megatron_sgopd.rollouts.vllm_servers.supervisor" in line
        )  # what sees to the server
        if not between and "vllm.entrypoints.openai.api_server" in line and str(model) in line:
            found.append(process)
    return found


def family(model: Path) -> list[psutil.Process]:
    """Servers and all that they started, engine cores and workers too."""
    return [p for s in servers(model) for p in (s, *s.children(recursive=True))]


def kill(server: psutil.Process) -> None:
    """A server and all that it started, but for Python's trackers: they tidy up after it."""
    for process in (server, *server.children(recursive=True)):
        if not any("resource_tracker" in part for part in process.cmdline()):
            process.kill()


def litter() -> set[str]:
    """What a run might leave: shared memory, sockets and folders."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {str(entry) for place in places for entry in place.iterdir()}


def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := true()):
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.2)
    return value


def rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return metrics_without_time(run_dir) if path.exists() else []


def test_one_step_off_with_a_teacher_and_a_killed_engine(world: Path, tmp_path: Path) -> None:
    run_dir, student = tmp_path / "run", world / "student" / "hf"
    run = start(
        world,
        run_dir,
        "num_steps=8",
        "rollout.max_policy_lag=1",
        "distill.phases.end_frac=0.13",  # a teacher in the first step alone
        "distill.phases.hold_frac=0.0",
    )
    until(lambda: len(rows(run_dir)) >= 3, "the third step")
    assert not servers(world / "teacher" / "hf"), "the teacher's engine is gone with its share"
    (server,) = servers(student)
    kill(server)
    assert run.wait(PATIENCE_S) == 0, Path(f"{run_dir}.out").read_text()[-3000:]
    check_run_folder(run_dir)
    done = rows(run_dir)
    assert [row["step"] for row in done] == list(range(1, 9))
    assert (run_dir / "engines" / "teacher-0.log").exists()
    assert done[0]["phases/requested_fraction"] > 0 == done[1]["phases/requested_fraction"]
    lags = [row["rollout/policy_lag"] for row in done]
    assert lags[0] == 0 and lags[1:3] == [1, 1] and lags[-1] == 1
    assert all(0 <= lag <= 1 for lag in lags)
    assert all(row["engine/probe_mismatch_kl"] < 1e-9 for row in done)
    assert [row["engine/restarts"] for row in done[:3]] == [0, 0, 0]
    assert done[-1]["engine/restarts"] == 1, "the killed one, and none that died of itself"
    assert "is started again" in Path(f"{run_dir}.out").read_text()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["engine"], summary["engine_version"]) == ("vllm", "0.32.0")
    assert not servers(student)


def test_no_server_outlives_a_run_that_is_stopped_or_killed(world: Path, tmp_path: Path) -> None:
    run_dir, student = tmp_path / "run", world / "student" / "hf"
    before_it = litter()
    settings = ("num_steps=1000", "distill.phases.enabled=false", "evaluation.every=0")
    run = start(world, run_dir, *settings)
    until(lambda: len(rows(run_dir)) >= 2, "the second step")
    run.terminate()
    assert run.wait(PATIENCE_S) == 0
    assert (run_dir / "status").read_text() == "stopped\n"
    assert not servers(student)
    assert not litter() - before_it
    before = len(rows(run_dir))

    run = start(world, run_dir, *settings)
    until(lambda: len(rows(run_dir)) > before, "a step after resuming")
    members = family(student)
    assert len(members) >= 2
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    until(
        lambda: not any(p.is_running() and p.status() != "zombie" for p in members), "the end", 60
    )
    assert [row["step"] for row in rows(run_dir)] == list(range(1, len(rows(run_dir)) + 1))


def test_a_server_started_by_hand_serves_a_run_and_leaves_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGOPD_ENGINE_KEY", "a secret")
    run_dir, before_it = tmp_path / "run", litter()
    (port,) = free_ports("127.0.0.1", 1)
    server = start(world, tmp_path / "server", f"rollout.vllm.port={port}", command="serve")
    url = f"http://127.0.0.1:{port}"
    until(VllmClient(url, "a secret").is_ready, "a server that is ready")
    settings = ("num_steps=2", "distill.phases.enabled=false", f"rollout.vllm.urls=['{url}']")
    run = start(world, run_dir, *settings)
    assert run.wait(PATIENCE_S) == 0, Path(f"{run_dir}.out").read_text()[-3000:]
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    server.send_signal(signal.SIGINT)
    assert server.wait(PATIENCE_S) == 0
    assert not servers(world / "student" / "hf")
    assert not litter() - before_it


@pytest.mark.skipif(not os.environ.get("LONG"), reason="make test-vllm LONG=1")
def test_an_engine_of_two_ranks_and_a_trainer_of_one(world: Path, tmp_path: Path) -> None:
    run_dir, before_it = tmp_path / "run", litter()
    run = start(
        world,
        run_dir,
        "num_steps=3",
        "parallel.tensor_model_parallel_size=1",
        "rollout.vllm.tensor_parallel_size=2",
        "distill.phases.enabled=false",
    )
    assert run.wait(PATIENCE_S) == 0, Path(f"{run_dir}.out").read_text()[-3000:]
    done = rows(run_dir)
    assert [row["step"] for row in done] == [1, 2, 3]
    assert all(row["engine/probe_mismatch_kl"] < 1e-9 for row in done)
    assert all(row["engine/mismatch_kl"] < 1e-6 for row in done)
    assert not litter() - before_it


@pytest.mark.parametrize("engines", [1, 2])
@pytest.mark.skipif(not os.environ.get("LONG"), reason="make test-vllm LONG=1")
def test_two_replicas_share_the_engines(world: Path, tmp_path: Path, engines: int) -> None:
    run_dir, student = tmp_path / "run", world / "student" / "hf"
    run = start(
        world,
        run_dir,
        "num_steps=6",
        "parallel.tensor_model_parallel_size=1",
        "parallel.data_parallel_size=2",
        f"rollout.vllm.num_engines={engines}",
        "distill.phases.enabled=false",
    )
    until(lambda: len(rows(run_dir)) >= 2, "the second step")
    running = servers(student)
    assert len(running) == engines
    kill(running[0])
    assert run.wait(PATIENCE_S) == 0, Path(f"{run_dir}.out").read_text()[-3000:]
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 7))
    assert "is started again" in Path(f"{run_dir}.out").read_text()
    assert not servers(student)
