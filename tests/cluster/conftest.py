"""The session's Slurm cluster, and tiny models on what stands for its shared file system."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sgopd.demo.models import STUDENT, TEACHER, write_model_dir
from megatron_sgopd.demo.world import WorldSizes, write_world
from tests.cluster.jobs import Cluster
from tests.cluster.mini_slurm import install

SIZES = WorldSizes(train=64, dev=4, test=6, teacher=8, student_noisy=8, student_terse=8)


@pytest.fixture(scope="session")
def installed() -> None:
    """Slurm's daemons, from Debian's packages where they are missing."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster needs root (network namespaces)")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("no slurmctld, and no apt-get to install it with")
    install()


@pytest.fixture(scope="session")
def shared() -> Iterator[Path]:
    """A folder that all nodes see; a short path, for there are sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="sgopd-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster(installed: None, shared: Path) -> Iterator[Cluster]:
    """Eight nodes; idle when a test begins."""
    with Cluster.started(shared, num_nodes=8) as cluster:
        yield cluster


@dataclass(frozen=True)
class Tiny:
    """A run that takes seconds a step on two cores."""

    student: Path
    teacher: Path
    world: Path

    def settings(self, run_dir: Path, *more: str) -> list[str]:
        return [
            f"model.student.hf_path={self.student}",
            f"model.teacher.hf_path={self.teacher}",
            f"data.train={self.world}/train.jsonl",
            "evaluation.data=null",
            "evaluation.during_data=null",
            "evaluation.every=0",
            "rollout.num_prompts=8",
            "rollout.n=2",
            "rollout.max_new_tokens=24",
            "optimizer.lr_warmup_steps=0",
            f"logging.run_dir={run_dir}",
            "logging.progress=false",
            *more,
        ]


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Tiny:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    places = {"student": STUDENT, "teacher": TEACHER}
    for seed, (role, size) in enumerate(places.items()):
        folder = shared / "models" / role
        write_model_dir(folder, size)
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    write_world(shared / "world", seed=3, level="normal", sizes=SIZES)
    return Tiny(shared / "models" / "student", shared / "models" / "teacher", shared / "world")
