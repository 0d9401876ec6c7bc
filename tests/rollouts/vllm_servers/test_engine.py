"""Engines that break off at awkward moments, and where servers are; vLLM's end is a fake."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.rollouts.make_engine import url_from_here
from megatron_sgopd.rollouts.vllm_servers.client import EngineDown
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.rollouts.vllm_servers.weight_sender import WeightSender
from megatron_sgopd.types import EngineLost
from tests.support.layouts import layout


class FakeClient:
    """Client of a server that is not there. The call `breaks` does not answer, `times` times."""

    url = "http://fake"

    def __init__(self, breaks: str, times: int) -> None:
        self.breaks, self.times = breaks, times
        self.calls: list[str] = []
        self.version = -1

    def is_ready(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> int:
            self.calls.append(name)
            if name == self.breaks and self.times > 0:
                self.times -= 1
                raise EngineDown(f"planned end in {name}")
            if name == "finish_update":
                self.version = given[0]
            return self.version

        return call


def weights() -> Iterator[tuple[str, Tensor]]:
    yield "w", torch.ones(3)


def a_run(folder: str, breaks: str, times: int) -> tuple[Any, list[str], float]:
    """Two pushes, each with a question after it, with a pause for training in between."""
    client = FakeClient(breaks, times)
    with layout(1) as groups:
        sender = WeightSender(client, "file", torch.device("cpu"), folder)  # type: ignore[arg-type]
        engine = VllmEngine(
            [Remote(0, client, None, sender)],  # type: ignore[arg-type]
            groups,
            version="0",
            dtype=torch.float32,
            bucket_bytes=100,
            max_concurrency=1,
            max_restarts=2,
            patience_s=1.0,
            colocated=True,
        )
        try:
            told: Any = []
            for version in (1, 2):
                engine.push_weights(weights, version)
                told += engine.probe(lambda c: c.next_logprob((1,), 2, 1.0))
                engine.sleep()
        except EngineLost as error:
            told = str(error)
        restarts = engine.incidents()["engine/restarts"]
        engine.close()
    return told, client.calls, restarts


@pytest.mark.parametrize(
    "breaks",
    ["start_update", "update", "finish_update", "policy_version", "next_logprob", "sleep"],
)
def test_an_engine_that_ends_at_any_moment_is_brought_back_with_its_weights(
    pool: Any, tmp_path: Path, breaks: str
) -> None:
    ((told, calls, restarts),) = pool(1).run(a_run, str(tmp_path), breaks, 1)
    assert told == [("http://fake", 1), ("http://fake", 2)], "what it holds when it is asked"
    assert restarts == 1
    assert calls.count("init_transfer") == 2, "a group of its own for who came back"
    assert not list(tmp_path.iterdir())


def test_waking_an_engine_that_has_ended_leaves_it_to_the_push(pool: Any, tmp_path: Path) -> None:
    ((told, _, restarts),) = pool(1).run(a_run, str(tmp_path), "wake_up", 1)
    assert told == [("http://fake", 1), ("http://fake", 2)]
    assert restarts == 1


@pytest.mark.parametrize("breaks", ["update", "next_logprob"])
def test_what_cannot_be_brought_back_is_given_up_with_the_reason(
    pool: Any, tmp_path: Path, breaks: str
) -> None:
    ((told, _, restarts),) = pool(1).run(a_run, str(tmp_path), breaks, 99)
    assert f"planned end in {breaks}" in told
    assert restarts <= 3


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"transfer_folder is '/no/folder'.*both see"):
        WeightSender(FakeClient("", 0), "file", torch.device("cpu"), "/no/folder")  # type: ignore[arg-type]


def test_servers_of_other_nodes_are_reached_by_their_nodes_name() -> None:
    here = socket.gethostname()
    mine = "http://127.0.0.1:8000"
    assert url_from_here(here, mine, "0.0.0.0") == mine
    assert url_from_here("node7", mine, "127.0.0.1") is None, "bound to that node's loopback"
    assert url_from_here("node7", mine, "0.0.0.0") == "http://node7:8000"
    assert url_from_here("node7", "http://10.0.0.7:8000", "10.0.0.7") == "http://10.0.0.7:8000"
    assert url_from_here("", "http://given:1", "127.0.0.1") == "http://given:1"
