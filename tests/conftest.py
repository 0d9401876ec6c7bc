"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.demo.models import STUDENT, TEACHER, write_model_dir
from megatron_sgopd.demo.world import WorldSizes, write_world
from tests.support.pool import Pool

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Elsewhere:
    """Tests of a folder that one make target runs, and that are skipped in all others."""

    marker: str
    variable: str  # what the target sets
    reason: str
    also: str | None = None  # a second variable without which a skip there is no failure

    @property
    def is_run(self) -> bool:
        return bool(os.environ.get(self.variable))

    @property
    def must_not_skip(self) -> bool:
        """What was to be proven was not."""
        return self.is_run and (self.also is None or bool(os.environ.get(self.also)))


ELSEWHERE = {
    HERE / "vllm": Elsewhere("vllm", "SGOPD_TEST_VLLM", "real vLLM: make test-vllm"),
    HERE / "gpu": Elsewhere("gpu", "SGOPD_TEST_GPU", "needs a GPU: make test-gpu"),
    # Root and apt may lack; in `.ci/run`, which sets CI, they must not.
    HERE / "cluster": Elsewhere(
        "slurm", "SGOPD_TEST_CLUSTER", "real Slurm: make test-cluster", also="CI"
    ),
}
SIZES = WorldSizes(train=24, dev=4, test=6, teacher=8, student_noisy=8, student_terse=8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (elsewhere := ELSEWHERE.get(item.path.parent)) is not None:
            item.add_marker(getattr(pytest.mark, elsewhere.marker))
            if not elsewhere.is_run:
                item.add_marker(pytest.mark.skip(reason=elsewhere.reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    elsewhere = ELSEWHERE.get(item.path.parent)
    long = "LONG=1" in str(report.longrepr)  # what the long form adds
    if elsewhere is not None and elsewhere.must_not_skip and report.skipped and not long:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    return report


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
    from tests.support import train_cases  # imports torch

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
