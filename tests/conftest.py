"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.demo.models import STUDENT, TEACHER, write_model_dir
from megatron_sgopd.demo.world import WorldSizes, write_world
from tests.pool import Pool

SIZES = WorldSizes(train=24, dev=4, test=6, teacher=8, student_noisy=8, student_terse=8)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(world_size)`: the session's ranks of that world size."""
    pools: dict[int, Pool] = {}

    def of(world_size: int) -> Pool:
        if world_size not in pools:
            pools[world_size] = Pool(world_size)
        return pools[world_size]

    yield of
    for each in pools.values():
        each.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, pool: Any) -> Path:
    """A world, and a student and a teacher of two `sft` steps each, made by the trainer."""
    from tests import train_cases  # imports torch

    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, level="normal", sizes=SIZES)
    for name, size in (("student", STUDENT), ("teacher", TEACHER)):
        write_model_dir(folder / "bare" / name, size)
        status = pool(2).run(
            train_cases.run,
            f"recipes/demo/{name}.yaml",
            [
                f"model.student.hf_path={folder}/bare/{name}",
                f"data.train={folder}/{name}_sft.jsonl",
                f"evaluation.data={folder}/test.jsonl",
                "evaluation.k=2",
                "num_steps=2",
                "rollout.num_prompts=8",
                "optimizer.lr_warmup_steps=0",
                f"logging.run_dir={folder}/{name}",
                "logging.progress=false",
            ],
        )
        assert status == ["finished"] * 2
    return folder
