"""An export is served by the real vLLM, which says the same as the embedded engine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_sgopd.config.schema import VllmConfig
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.rollouts.vllm_servers.server import VllmServer, make_specs
from megatron_sgopd.types import Request
from tests.support import conversion_cases, model_cases, tiny
from tests.vllm.conftest import KEY


def test_an_export_of_odd_sizes_gives_the_same_greedy_text(pool: Any, tmp_path: Path) -> None:
    """head_dim 96, untied, 3 layers, vocabulary 331; written under TP 2, its source deleted."""
    hf = tiny.make_hf_dir(tmp_path / "hf", seed=4, layers=3, head_dim=96, vocab=331, positions=512)
    conversion_cases.run(pool, conversion_cases.to_megatron(hf, tmp_path / "mcore", 2))
    shutil.rmtree(hf)
    out = tmp_path / "out"
    conversion_cases.run(pool, conversion_cases.to_hf(tmp_path / "mcore", out))
    requests = [
        Request(tuple(range(7 + i, 40 + 3 * i)), seed=i, max_new_tokens=24, temperature=0.0)
        for i in range(4)
    ]
    vllm = VllmConfig(dtype="float32", max_model_len=400)
    # A teacher's server loads the weights of its directory, a student's waits for a push.
    (spec,) = make_specs(vllm, out, "teacher", tmp_path, on_gpu=False, key=KEY)
    server = VllmServer(spec)
    server.start()
    client = VllmClient(spec.url, KEY)
    try:
        server.wait_ready(client.is_ready)
        served = [client.complete(request) for request in requests]
    finally:
        server.stop()
    engine = model_cases.make_engine(str(out))
    assert read_hf_config(out).vocab_size == 331
    for theirs, ours in zip(served, engine.generate(requests), strict=True):
        assert theirs.token_ids == ours.token_ids
        assert len(set(theirs.token_ids)) > 1
