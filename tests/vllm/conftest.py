"""One real vLLM server for the session, on a tiny model whose weights are the tests' to push."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sgopd.config.schema import VllmConfig
from megatron_sgopd.rollouts.vllm_servers.server import VllmServer, installed_version, make_specs
from tests.support import tiny

KEY = "the-tests-own-key"


@dataclass(frozen=True)
class Served:
    url: str
    key: str
    model: Path
    log: Path


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    assert installed_version(None), "make test-vllm installs it"
    folder = tmp_path_factory.mktemp("served")
    # Of an odd vocabulary, with a tied head: what vLLM's own reload leaves stale on CPUs.
    model = tiny.make_hf_dir(
        folder / "model", seed=1, layers=4, tied=True, vocab=331, positions=512
    )
    vllm = VllmConfig(dtype="float32", max_model_len=400)
    (spec,) = make_specs(vllm, model, "student", folder, on_gpu=False, key=KEY)
    server = VllmServer(spec)
    server.start()
    from megatron_sgopd.rollouts.vllm_servers.client import VllmClient

    server.wait_ready(VllmClient(spec.url, KEY).is_ready)
    yield Served(spec.url, KEY, model, spec.log)
    server.stop()
