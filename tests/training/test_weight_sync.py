"""What a push needs of the trainer's memory, measured; the engine's end is a fake."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd.model.weight_stream import iter_hf_weights, load_hf_weights
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.rollouts.vllm_servers.weight_sender import WeightSender
from tests.support import tiny
from tests.support.layouts import layout
from tests.support.model_cases import build
from tests.support.pool import Pool

MIB = 2**20
BUCKET = 8 * MIB
NOISE = MIB  # pages of the allocator, of the file and of Python


class FakeServersClient:
    """Stands for a vLLM server that says yes to everything."""

    url = "http://fake"

    def __init__(self) -> None:
        self.version, self.sizes = -1, list[int]()

    def is_ready(self) -> bool:
        return True

    def init_transfer(self, info: dict[str, Any]) -> None:
        pass

    def start_update(self) -> None:
        pass

    def update(self, entries: list[list[Any]], source: dict[str, Any]) -> None:
        self.sizes.append(Path(source["path"]).stat().st_size)

    def finish_update(self, policy_version: int) -> None:
        self.version = policy_version

    def policy_version(self) -> int:
        return self.version

    def close(self) -> None:
        pass


def pushed(path: str, folder: str, layout_of: dict[str, int]) -> dict[str, float]:
    """Bytes: by which the pushing rank's peak grew, of the largest layer, of all weights."""
    with layout(**layout_of) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        client, remotes = FakeServersClient(), []
        if groups.is_replica_first_rank:
            sender = WeightSender(client, "file", torch.device("cpu"), folder)  # type: ignore[arg-type]
            remotes = [Remote(0, client, None, sender)]  # type: ignore[arg-type]
        engine = VllmEngine(
            remotes,
            groups,
            version="0",
            dtype=torch.float32,
            bucket_bytes=BUCKET,
            max_concurrency=1,
            max_restarts=0,
            patience_s=1.0,
        )
        engine.push_weights(lambda: iter_hf_weights(model), 1)  # what is allocated once
        client.sizes.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmRSS")
        engine.push_weights(lambda: iter_hf_weights(model), 2)
        grown = resident("VmHWM") - before
        sizes = {name: t.numel() * 4 for name, t in iter_hf_weights(model)}
        engine.close()
    layers: dict[str, int] = {}
    for name, size in sizes.items():
        layer = name.split(".")[2] if ".layers." in name else name
        layers[layer] = layers.get(layer, 0) + size
    sent = float(sum(client.sizes))
    return {
        "grown": grown,
        "layer": max(layers.values()),
        "total": sum(sizes.values()),
        "sent": sent,
        "largest bucket": max(client.sizes, default=0),
    }


def resident(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024.0


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Of their own, whose allocator gives back what is freed: else glibc's heap is measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 17))
        pool = Pool(2)
        pool.run(os.getpid)  # starts them
    yield pool
    pool.close()


@pytest.mark.parametrize("layout_of", [{"tp": 2}, {"pipeline_model_parallel_size": 2}], ids=str)
def test_a_push_needs_a_bucket_and_a_layer(
    ranks: Pool, tmp_path: Path, layout_of: dict[str, int]
) -> None:
    model = tiny.make_hf_dir(tmp_path / "model", seed=0, layers=8, hidden=512, heads=8)
    told = ranks.run(pushed, str(model), str(tmp_path), layout_of)[0]
    print({name: f"{size / MIB:.1f} MiB" for name, size in told.items()})
    assert told["sent"] == told["total"] > 3 * (BUCKET + told["layer"])
    assert told["largest bucket"] <= BUCKET
    assert told["grown"] <= BUCKET + told["layer"] + NOISE
